"""Real services for tests: skipped with a reason where they are not installed, an error where they must be (CI)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REQUIRED = "LATENTLINE_REQUIRE_SERVICES"

_SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
KillWait=20
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def require(there: bool, reason: str) -> None:
    """Skip the test for a reason, or fail it where services are required."""
    if not there:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RayHead:
    """A Ray head. folder: its files. address: of the cluster, for RAY_ADDRESS. dashboard: URL jobs are submitted to."""

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]


@contextmanager
def ray_head(folder: Path, num_cpus: int = 4) -> Iterator[RayHead]:
    """A Ray head as `ray start --head` makes one, in the folder; ended by its own process group."""
    port, dashboard = free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--num-cpus={num_cpus}",
        f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=100000000",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log, _process(command, log, environment) as process:
        head = RayHead(folder, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
        _wait_for(lambda: _answers(dashboard), process, folder / "head.log")
        yield head


@dataclass(frozen=True)
class Slurm:
    """A SLURM cluster of this machine alone. environment: for its commands and for jobs."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """`sbatch --parsable ARGUMENTS`; the job's number."""
        return self.run("sbatch", "--parsable", f"--chdir={self.folder}", *arguments)

    def states(self, job: str) -> dict[str, str]:
        """State of each array task that is still known to the controller, by its index."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        return dict(line.split() for line in lines.splitlines())


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """munged, slurmctld and slurmd with keys, sockets, ports and state of their own in the folder."""
    missing = [name for name in _SLURM_PROGRAMS if _program(name) is None]
    require(not missing, f"no SLURM on this machine ({', '.join(missing)} not found): apt-get install slurm-wlm munge")
    require(os.geteuid() == 0, "SLURM's daemons want to be root here")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(_SLURM_CONF.format(folder=folder, host=host, controller_port=free_port(), node_port=free_port()))
    environment = os.environ | {
        "SLURM_CONF": str(conf),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    cluster = Slurm(folder, environment)
    munge_options = [
        f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--num-threads=2",
    ]  # fmt: skip
    commands = {
        "munged": ["--foreground", "--force", *munge_options],
        "slurmctld": ["-D", "-f", str(conf)],
        "slurmd": ["-D", "-f", str(conf), "-N", host],
    }
    with ExitStack() as stack:
        for name, options in commands.items():
            log = stack.enter_context((folder / f"{name}.out").open("w"))
            process = stack.enter_context(_process([str(_program(name)), *options], log, environment))
            if name == "munged":
                _wait_for((folder / "munge.socket").exists, process, folder / "munged.out")
        _wait_for(lambda: _idle(cluster), process, folder / "slurmctld.log")
        yield cluster
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environment, check=False)


@dataclass(frozen=True)
class Browser:
    """What a headless Chromium showed of a page. dom: after loading. console: its messages. requests: to any host."""

    dom: str
    console: list[str]
    requests: list[str]


def browse(page: Path, folder: Path) -> Browser:
    """Load a local page. Whatever it asks of the network goes to a proxy of this machine, and nowhere else."""
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_CONNECT = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        proxy = f"--proxy-server=http://127.0.0.1:{server.server_address[1]}"
        done = _chromium(folder, proxy, "--enable-logging=stderr", "--dump-dom", page.as_uri())
        server.shutdown()
        thread.join()
    own = ("google.com", "gstatic.com", "googleapis.com", "gvt1.com")  # the browser's own services
    requests = [url for url in asked if not any(host in url for host in own)]
    return Browser(done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line], requests)


def photograph(page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> None:
    """Write a PNG of a local page in a light or dark colour scheme."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _chromium(picture.parent, scheme, f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri())
    assert picture.is_file()


def _chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium")
    require(program is not None, "no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory(dir=folder) as profile:
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={profile}",
        ]  # fmt: skip
        command = [str(program), *options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def _idle(cluster: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=cluster.environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip() == "idle"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/local/sbin")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(true: object, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        text = log.read_text() if log.exists() else ""
        assert process.poll() is None, f"{process.args} ended: {text[-2000:]}"
        assert time.monotonic() < deadline, f"{process.args} is not ready: {text[-2000:]}"
        time.sleep(0.1)


@contextmanager
def _process(command: list[str], log: object, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, first by SIGTERM, with all it has started in its session."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in _session(process.pid):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


def _session(leader: int) -> list[int]:
    """Processes of the session that a process has led."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found
