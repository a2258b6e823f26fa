# The one place for set-up. Every target first brings .venv up to date; that takes no time when nothing has changed.

SHELL := bash
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
RUN := $(VENV)/bin/python

# What .venv is made with: the first of these that will do, or make PYTHON=/path/to/python3.11
CANDIDATES := python3.11 python3.12 python3 python
PYTHON ?= $(shell for candidate in $(CANDIDATES); do \
	$$candidate deployments/check.py --interpreter >/dev/null 2>&1 && echo $$candidate && break; done)

# Given twice, because older pips apply the first to source builds too and newer ones only the second. The paths are
# relative, because pip splits the values at spaces and a checkout may lie under a folder with one in its name.
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(RUN) -m pip install --no-input --progress-bar off -e ".[dev]"

# Processes that run tests.
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)

# The parts of pip's output that tell how far a long installation is.
PROGRESS := ^ *(Downloading|Using cached) .*\([0-9]{2,}\.[0-9] MB\)|^ *Building wheel for .*started|^Installing collected packages

# Seconds for each target of make fuzz, and the targets: tests/fuzz/targets.py.
FUZZ_SECONDS ?= 300
TARGETS ?= pictures checkpoints pickles labelme coco masks heat_maps weights learned settings segmenter tars

.PHONY: help setup demo test test-all chaos lint audit fuzz docs bench gpu browser clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything that the other targets need
	@$(RUN) -m deployments.check

demo: $(STAMP)  ## mine photos with a published model, finetune it; look at demo/workspace/report.html
	@$(VENV)/bin/desra demo --output demo

test: $(STAMP)  ## run the tests, those that are marked slow left out; about six minutes on two cores
	$(RUN) -m pytest -n $(WORKERS)

test-all: $(STAMP)  ## run all tests; about half an hour on two cores
	$(RUN) -m pytest -n $(WORKERS) -m "not faults" --timeout 1800

SEED ?= 0
FAULTS ?= 200
chaos: $(STAMP)  ## disturb runs by FAULTS=200 random faults of SEED=0, and hosts; or repeat ONLY=17; an hour and a half
	SEED=$(SEED) FAULTS=$(FAULTS) ONLY="$(ONLY)" $(RUN) -m pytest -s -m faults $(if $(ONLY),-k many)

lint: $(STAMP) audit  ## check rules and format (ruff), types (mypy), spelling (codespell), sizes of files, and audit
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

# Without a network this takes seconds and passes.
audit: $(STAMP)  ## look for known vulnerabilities of the versions in constraints.txt, where OSV's database can be reached
	@found=$$($(VENV)/bin/pip-audit --vulnerability-service osv --requirement constraints.txt --no-deps --disable-pip \
		--timeout 10 --progress-spinner off 2>&1) && echo "audit: no known vulnerabilities" || { \
		[[ $$found == *ConnectionError* || $$found == *Timeout* ]] || { echo "$$found" >&2; exit 1; }; \
		echo "audit: nothing was looked up, since OSV's database cannot be reached"; }

fuzz: $(STAMP)  ## give each reader of files made-up files for a while: make fuzz FUZZ_SECONDS=600; finds go to .fuzz
	$(RUN) -m pip install -q -r tests/fuzz/requirements.txt
	for target in $(TARGETS); do $(RUN) tests/fuzz/run.py $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

bench: $(STAMP)  ## measure speed and memory
	$(RUN) tests/benchmarks/run.py

docs: $(STAMP)  ## build the documentation site: docs/_build/html/index.html
	$(VENV)/bin/sphinx-build -q -E -W --keep-going -b html docs docs/_build/html

gpu:  ## measure all that only a GPU can show; WHEELS=folder where pip reaches no index (CONTRIBUTING.md)
ifdef WHEELS
	$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target .gpu $(WHEELS)/*.whl
	PYTHONPATH=.gpu:. $(PYTHON) tests/benchmarks/gpu.py
else
	@$(MAKE) setup
	$(RUN) tests/benchmarks/gpu.py
endif

browser:  ## install Debian's Chromium, with which the tests look at pages; needs root
	@command -v chromium chromium-browser google-chrome >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

clean:  ## remove .venv, the caches and the demo
	rm -rf $(VENV) .gpu .fuzz demo docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# There is no stamp while packages are being installed, and an environment without one is made anew: what an
# interrupted set-up left behind is never used.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No usable Python among $(CANDIDATES): install Python 3.11 with its venv module," \
		"or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" deployments/check.py
	@test -f $@ || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $@
	@echo "Installing into $(VENV): about two minutes and 2.3 GB, or 6 GB where PyTorch brings CUDA. Log: $(LOG)"
	@set -o pipefail; trap 'exit 130' INT; \
	$(INSTALL) 2>&1 | tee $(LOG) | { grep --line-buffered -oE '$(PROGRESS)' || true; } || { \
		tail -n 20 $(LOG) | cut -c 1-300 >&2; \
		echo "Set-up failed; the reason is above, all of it in $(LOG). The same command starts it again." >&2; \
		exit 1; }
	@touch $@
