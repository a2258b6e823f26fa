"""The memory that a large photo takes, and windows when the system really gives no more memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")

HEAD = r"""
import dataclasses, re, resource, sys
from pathlib import Path
import numpy as np, torch
from desra_core.networks.checkpoints import load_model
from desra_core.networks.super_resolution import super_resolve

torch.set_num_threads(1)
model = load_model(Path(sys.argv[1]))

def photo(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)

def status(name):
    return int(re.search(name + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

super_resolve(model, photo(16, 16))
"""

BOUNDED = """
pixels = photo(1500, 2000)
before = status("VmRSS")
result = super_resolve(model, pixels).pixels
print(status("VmHWM") - before - result.nbytes)
"""

SCARCE = """
pixels = photo(250, 220)
size = status("VmSize")
for spare in range(160, 30, -10):
    resource.setrlimit(resource.RLIMIT_AS, (size + spare * 2**20, resource.RLIM_INFINITY))
    result, tile = super_resolve(model, pixels)
    if tile:
        break
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
expected = super_resolve(dataclasses.replace(model, traits=model.traits._replace(tile=160)), pixels).pixels.astype(int)
print(spare, tile, abs(result - expected).max())
"""


def run(script, checkpoint):
    command = [sys.executable, "-c", HEAD + script, checkpoint]
    # So that glibc returns the memory of each tensor at once; what it keeps differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.slow
def test_a_large_photo_takes_little_beside_its_result(checkpoint):
    """Without windows, the features alone would take 200 MB each, and the result as float32 600 MB."""
    assert int(run(BOUNDED, checkpoint("SRVGGNetCompact x4"))[-1]) < 500e6


@pytest.mark.slow
def test_windows_shrink_when_memory_really_runs_out(checkpoint):
    _, tile, error = run(SCARCE, checkpoint("RRDBNet x4"))
    assert 160 <= int(tile) < 250
    assert int(error) <= 1
