"""Clusters that a file names: real ones of this machine, by SSH and TLS too, and what is refused before any starts."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Security, get_worker
from distributed.system import MEMORY_LIMIT

from desra_core.errors import AbsentError, UsageError
from desra_core.settings import Machine
from tasks import dask_cluster
from tasks.cluster_file import read_cluster_file
from tasks.dask_cluster import open_dask
from tests.conftest import refusal
from tests.served import until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EXAMPLES = Path(__file__).parents[2] / "docs" / "how-to" / "clusters"
LOCAL = {
    "cluster_class": "distributed.LocalCluster",
    "cluster_kwargs": {"threads_per_worker": 1, "memory_limit": "1GB", "dashboard_address": "127.0.0.1:0"},
}


def written(folder: Path, content: Any) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())


def with_kwargs(**arguments: Any) -> dict[str, Any]:
    return LOCAL | {"cluster_kwargs": LOCAL["cluster_kwargs"] | arguments}


def process_of(machine: Machine, folder: Path) -> tuple[int, int]:
    """The number of workers of a run, and the process that computes for it."""
    with open_dask(machine, folder=folder) as dask:
        return dask.workers, dask.follow(os.getpid, resources={}, on_second=lambda: None)


REFUSED = {
    "no file": (None, r"cannot be read \(FileNotFoundError"),
    "no YAML": ("a: [", r"is no YAML \(.*line 1"),
    "no keys": ("LocalCluster", "holds no keys; give cluster_class, cluster_kwargs, adapt_kwargs"),
    "an unknown key": (LOCAL | {"adapt": {}}, "has the unknown key adapt; keys are cluster_class"),
    "a wrong value": (LOCAL | {"workers": 0}, r"workers: 0 is not accepted \(.*greater than or equal to 1\)"),
    "no class": ({"workers": 1}, r"does not fit together \(give either cluster_class or address\)"),
    "two sizes": (LOCAL | {"workers": 1, "adapt_kwargs": {"maximum": 2}}, "give either adapt_kwargs or workers"),
    "none at first": (LOCAL | {"adapt_kwargs": {"minimum": 0}}, "a run needs a minimum of 1 or more"),
    "no time": (LOCAL | {"wait": "long"}, "no length of time"),
    "an unknown class": ({"cluster_class": "distributed.Cloud"}, "cluster_class: distributed.Cloud cannot be imported"),
    "no class of a cluster": ({"cluster_class": "os.system"}, "cluster_class: os.system is no cluster of Dask; give"),
    "an absent package": (
        {"cluster_class": "nowhere_at_all.Cluster"},
        "nowhere_at_all.Cluster needs the package nowhere_at_all, which is not installed; pip install nowhere-at-all, "
        "or name another class",
    ),
    "an unknown argument": (with_kwargs(n_wrokers=1), "cluster_kwargs: distributed.LocalCluster takes no n_wrokers;"),
    "no certificate": (LOCAL | {"security": {"tls_ca_file": "none.pem"}}, "tls_ca_file: none.pem does not exist; give"),
    "an unknown certificate": (LOCAL | {"security": {"ca": "none.pem"}}, r"security: TypeError: .*'ca'.*; give arg"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_before_anything_starts(case: str, tmp_path: Path) -> None:
    content, told = REFUSED[case]
    file = written(tmp_path, content) if content else tmp_path / "cluster.yaml"
    with pytest.raises(UsageError) as refused:
        read_cluster_file(file)
    line = str(refused.value)
    assert line.startswith(f"{file}: ")
    assert re.search(told, line)
    assert "\n" not in line


def test_a_command_refuses_it_with_code_2(desra_here, tmp_path: Path) -> None:
    given = ["mine", tmp_path, "--gan-model", "none.pth", "--workspace", tmp_path / "ws"]
    file = written(tmp_path, with_kwargs(n_wrokers=1))
    assert "takes no n_wrokers" in refusal(desra_here(*given, "--cluster", file))
    both = desra_here(*given, "--cluster", file, "--scheduler", "tcp://127.0.0.1:9")
    assert f"--cluster: {file} is not accepted (--scheduler is given, too)" in refusal(both)
    assert not (tmp_path / "ws").exists()


def test_a_wrong_value_of_an_argument_is_one_line(tmp_path: Path) -> None:
    file = written(tmp_path, with_kwargs(protocol="pigeon://"))
    told = r"distributed.LocalCluster (refuses its arguments|does not start) \(.*pigeon"
    with pytest.raises(UsageError, match=told), open_dask(Machine(cluster=file)):
        pass


def trouble_with(file: Path) -> str:
    try:
        read_cluster_file(file)
    except UsageError as error:
        return str(error)
    return ""


def test_the_examples_can_be_used() -> None:
    """As far as their packages are installed: classes, arguments and keys."""
    absent = "needs the package|does not exist; give the path of a PEM file"
    refused = [trouble for file in EXAMPLES.glob("*.yaml") if (trouble := trouble_with(file))]
    assert [trouble for trouble in refused if not re.search(absent, trouble)] == []
    assert len(refused) < len(list(EXAMPLES.iterdir()))


def test_workers_of_a_local_cluster_compute_and_end_with_the_run(tmp_path: Path) -> None:
    adapting = LOCAL | {"adapt_kwargs": {"maximum": 2}, "cluster_kwargs": LOCAL["cluster_kwargs"] | {"n_workers": 0}}
    workers, process = process_of(Machine(cluster=written(tmp_path, adapting)), tmp_path)
    assert workers in (1, 2)
    assert process != os.getpid()
    until(lambda: not Path(f"/proc/{process}").exists())
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.yaml"]


def test_a_cluster_without_workers_is_given_up(tmp_path: Path) -> None:
    file = written(tmp_path, with_kwargs(n_workers=0) | {"wait": "1 second"})
    told = "none of its workers has come for 0:00:01; look at their logs, or raise wait in the file"
    with pytest.raises(AbsentError, match=told), open_dask(Machine(cluster=file), folder=tmp_path):
        pass


def test_threads_of_a_worker_share_its_memory(tmp_path: Path, capfd) -> None:
    """Each takes an image of its own at a time."""
    file = written(tmp_path, with_kwargs(n_workers=1, threads_per_worker=8, memory_limit="8GB"))
    with open_dask(Machine(cluster=file), folder=tmp_path) as dask:
        assert (dask.workers, dask.max_pixels) == (1, 11_250_000)
        assert dask.follow(lambda: get_worker().state.nthreads, resources={}, on_second=lambda: None) == 8
    told = f"warning: {file}: a worker has 8 threads, each with 1/8 of its memory; one thread each is safer"
    assert told in capfd.readouterr().err.splitlines()


def test_workers_without_a_limit_share_the_memory_of_their_machine(tmp_path: Path) -> None:
    file = written(tmp_path, with_kwargs(n_workers=2, memory_limit=0))
    with open_dask(Machine(cluster=file), folder=tmp_path) as dask:
        assert dask.workers == 2
        assert dask.max_pixels == dask_cluster._largest_image(MEMORY_LIMIT // 2, dask_cluster.WORKER_BYTES)


@pytest.mark.slow
def test_a_command_computes_the_same_on_any_cluster(desra_alone, make_pairs, tmp_path: Path) -> None:
    """On workers with eight threads too."""
    make_pairs(tmp_path, 6)
    given = ["detect", "--mse-sr", tmp_path / "mse_sr", "--gan-sr", tmp_path / "gan_sr", "--min-area", "100"]
    file = written(tmp_path, with_kwargs(n_workers=1, threads_per_worker=8, memory_limit="8GB"))
    masks = []
    for name, where in (("own", []), ("theirs", ["--cluster", file])):
        run = desra_alone(*given, "--workspace", tmp_path / name, *where)
        assert run.returncode == 0, run.stderr
        masks.append({mask.name: mask.read_bytes() for mask in (tmp_path / name / "masks").rglob("*.png")})
        assert ("a worker has 8 threads" in run.stderr) == bool(where)
    assert len(masks[0]) == 6
    assert masks[0] == masks[1]


class Authority:
    """Certificates of one authority, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self._signed(self._name, self._key, ca=True))

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, secret = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        certificate.write_bytes(self._signed(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, ca=False))
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        secret.write_bytes(key.private_bytes(*form))
        return certificate, secret

    @property
    def client(self) -> dict[str, str]:
        """The part of a cluster file about the certificates of a client."""
        certificate, key = self.issue("client")
        return {"tls_ca_file": str(self.ca), "tls_client_cert": str(certificate), "tls_client_key": str(key)}


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[tuple[str, Authority]]:
    """The address of a scheduler with a worker, both with certificates, and their authority."""
    authority, told = Authority(tmp_path / "authority"), tmp_path / "scheduler.json"
    processes = []

    def start(name: str, *arguments: object) -> None:
        certificate, key = authority.issue(name)
        tls = ["--tls-ca-file", authority.ca, "--tls-cert", certificate, "--tls-key", key, "--no-dashboard"]
        command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *map(str, [*arguments, *tls])]
        with (tmp_path / f"{name}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path))

    start("scheduler", "--host", "tls://127.0.0.1", "--port", 0, "--scheduler-file", told)
    until(lambda: told.exists() and told.read_text().endswith("}"))
    address = json.loads(told.read_text())["address"]
    start("worker", address, "--host", "127.0.0.1", "--nthreads", 1, "--memory-limit", "1GB", "--no-nanny")
    yield address, authority
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets that Dask leaves open
def test_an_encrypted_cluster_takes_certificates_of_its_authority_alone(encrypted, tmp_path, monkeypatch) -> None:
    address, authority = encrypted
    assert address.startswith("tls://")
    known = written(tmp_path, {"address": address, "security": authority.client})
    until(lambda: _has_workers(known, tmp_path))
    assert process_of(Machine(cluster=known), tmp_path)[0] == 1
    monkeypatch.setattr(dask_cluster, "_CONNECT_SECONDS", 2)
    (tmp_path / "other").mkdir()
    stranger = written(tmp_path / "other", {"address": address, "security": Authority(tmp_path / "none").client})
    for machine in (Machine(scheduler=address), Machine(cluster=stranger)):
        with pytest.raises(AbsentError) as refused, open_dask(machine):
            pass
        line = str(refused.value)
        assert line.startswith(f"{address}: no Dask scheduler answers (")
        assert "with certificates in Dask's configuration or in the file of --cluster" in line
        assert "\n" not in line


def _has_workers(file: Path, folder: Path) -> bool:
    try:
        with open_dask(Machine(cluster=file), folder=folder):
            return True
    except AbsentError:
        return False


def test_a_local_cluster_may_be_encrypted(tmp_path: Path) -> None:
    security = Security.temporary()
    names = {name: tmp_path / name for name in ("tls_ca_file", "tls_client_cert", "tls_client_key")}
    for name, file in names.items():
        file.write_text(getattr(security, name))
    roles = {f"tls_{role}_{part}": str(names[f"tls_client_{part}"])
             for role in ("client", "worker", "scheduler") for part in ("cert", "key")}  # fmt: skip
    given = {"tls_ca_file": str(names["tls_ca_file"])} | roles
    file = written(tmp_path, with_kwargs(n_workers=1, protocol="tls://") | {"security": given})
    with open_dask(Machine(cluster=file), folder=tmp_path) as dask:
        assert dask.client.scheduler.address.startswith("tls://")
        assert dask.follow(os.getpid, resources={}, on_second=lambda: None) != os.getpid()


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """How to connect to an SSH server on this machine that knows one key."""
    pytest.importorskip("asyncssh")
    if (server := shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    folder = tmp_path / "ssh"
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {"HostKey": folder / "host", "AuthorizedKeysFile": folder / "authorized_keys", "UsePAM": "no",
               "PidFile": "none", "StrictModes": "no", "PasswordAuthentication": "no"}  # fmt: skip
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    command = [server, "-D", "-e", "-f", "/dev/null", "-p", str(port), "-o", "ListenAddress=127.0.0.1", *given]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    until(lambda: _answers(port))
    kind, key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    yield {"port": port, "username": getpass.getuser(), "client_keys": [str(folder / "user")],
           "known_hosts": str(folder / "known_hosts")}  # fmt: skip
    process.kill()
    process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # connections that asyncssh leaves open
def test_workers_are_started_by_ssh(ssh, tmp_path: Path) -> None:
    """The example, with the hosts of this test."""
    content = example("ssh")
    options = {"nthreads": 1, "memory_limit": "1GB"}
    content["cluster_kwargs"] |= {"hosts": ["127.0.0.1"] * 3, "connect_options": ssh, "worker_options": options,
                                  "remote_python": sys.executable}  # fmt: skip
    workers, process = process_of(Machine(cluster=written(tmp_path, content)), tmp_path)
    assert workers == 2
    assert process != os.getpid()
    until(lambda: not Path(f"/proc/{process}").exists())
    content["cluster_kwargs"]["connect_options"] = ssh | {"client_keys": []}
    with pytest.raises(AbsentError, match=r"SSHCluster does not start \(.*; mend cluster_kwargs, or what it names"):
        process_of(Machine(cluster=written(tmp_path, content)), tmp_path)


def test_jobs_of_slurm_are_what_the_example_says() -> None:
    """What SLURM would be given."""
    jobqueue = pytest.importorskip("dask_jobqueue")
    scripts = {}
    for name in ("slurm", "slurm-gpu"):
        file = read_cluster_file(EXAMPLES / f"{name}.yaml")
        with jobqueue.SLURMCluster(**file.cluster_kwargs, scheduler_options={"dashboard_address": ":0"}) as cluster:
            scripts[name] = cluster.job_script()
    for name, cores, memory, limit in (("slurm", 1, "6G", "5.59GiB"), ("slurm-gpu", 3, "15G", "14.90GiB")):
        script = scripts[name]
        asked = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
        assert {"-n 1", f"--cpus-per-task={cores}", f"--mem={memory}", "-t 8:00:00"} <= set(asked)
        assert ("--gres=gpu:1" in asked) == (name == "slurm-gpu")
        assert f"--nthreads {cores} --memory-limit {limit}" in script
        assert "/shared/desra/.venv/bin/python -m distributed.cli.dask_worker tcp://" in script
    assert "--resources GPU=3" in scripts["slurm-gpu"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a SLURM of one node, this machine."""
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    if os.getuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("no SLURM here, or not root: apt-get install slurmd slurmctld slurm-client munge")
    folder, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    folder.mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    settings = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root",
        "AuthInfo": f"socket={folder}/munge", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
        "SlurmctldPort": ports[0], "SlurmdPort": ports[1], "StateSaveLocation": folder, "SlurmdSpoolDir": folder,
        "SlurmctldPidFile": folder / "ctld.pid", "SlurmdPidFile": folder / "d.pid", "MpiDefault": "none",
        "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SlurmdParameters": "config_overrides",
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=20000 State=UNKNOWN"]
    lines += ["PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{name}={folder / file}" for name, file in (("socket", "munge"), ("key-file", "key"),
             ("pid-file", "pid"), ("log-file", "munge.log"), ("seed-file", "seed"))]  # fmt: skip
    processes = []
    for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
        with (folder / f"{command[0]}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        if command[0] == "munged":
            until((folder / "munge").exists)
    until(lambda: b"idle" in subprocess.run(["sinfo"], capture_output=True, check=False).stdout)
    yield folder
    for process in reversed(processes):
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_workers_are_jobs_of_slurm(slurm: Path, tmp_path: Path) -> None:
    """The example, with the paths of this test."""
    content = example("slurm")
    content["cluster_kwargs"] |= {"python": sys.executable, "log_directory": str(slurm / "jobs"), "memory": "2GB"}
    content["adapt_kwargs"] = {"minimum": 1, "maximum": 1}
    workers, process = process_of(Machine(cluster=written(tmp_path, content)), tmp_path)
    assert workers == 1
    assert process != os.getpid()
    until(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, check=True).stdout)
    assert list((slurm / "jobs").glob("dask-worker-1.*"))


def test_the_manifest_of_kubernetes_has_what_the_operator_looks_for() -> None:
    """Names, ports and selectors are those of a manifest by dask-kubernetes."""
    operator = pytest.importorskip("dask_kubernetes.operator")
    file = read_cluster_file(EXAMPLES / "kubernetes.yaml")
    ours, theirs = file.cluster_kwargs["custom_cluster_spec"], operator.make_cluster_spec(name="desra", n_workers=8)
    assert (ours["apiVersion"], ours["kind"]) == (theirs["apiVersion"], theirs["kind"])
    assert ours["spec"]["worker"]["replicas"] == theirs["spec"]["worker"]["replicas"]
    service, made = (each["spec"]["scheduler"]["service"] for each in (ours, theirs))
    assert service["selector"] == made["selector"]
    assert [port | {"protocol": "TCP"} for port in service["ports"]] == made["ports"]
    for part in ("scheduler", "worker"):
        [container], [usual] = (each["spec"][part]["spec"]["containers"] for each in (ours, theirs))
        assert container["name"] == usual["name"]
    [scheduler], [usual] = (each["spec"]["scheduler"]["spec"]["containers"] for each in (ours, theirs))
    assert [port | {"protocol": "TCP"} for port in scheduler["ports"]] == usual["ports"]
    [worker] = ours["spec"]["worker"]["spec"]["containers"]
    assert worker["command"][2:4] == ["--name", "$(DASK_WORKER_NAME)"]


def test_dask_cuda_is_named_where_it_is_absent() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("dask-cuda may be here")
    told = "dask_cuda.LocalCUDACluster needs the package dask_cuda, which is not installed; pip install dask-cuda, or"
    with pytest.raises(UsageError, match=told):
        read_cluster_file(EXAMPLES / "cuda.yaml")
