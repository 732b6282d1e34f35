"""A real Slurm of several nodes on this machine, in a folder of its own.

Every node is a slurmd; ``networks`` says what the nodes are to each other. Nothing is installed
except where ``CI=1``.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .networks import Network

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("slurm-wlm", "munge", "libslurm-dev", "gcc", "libc6-dev", "iproute2")
HEADER = Path("/usr/include/slurm/spank.h")
START_S = 60.0
INSTALLATION_FAILED = "apt-get could not"
CONF = """\
ClusterName=local
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
SlurmdTimeout={silence_s}
KillWait=5
FirstJobId={first_job}
MinJobAge=600
JobRequeue=1
GresTypes=gpu
PlugStackConfig={root}/plugstack.conf
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=16 RealMemory=1000 Gres=gpu:8
{nodes}
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=abrupt Nodes=ALL MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no Slurm can be started here; installs it first where ``CI=1``."""
    missing = [name for name in DAEMONS if _which(name) is None]
    has_all = not missing and HEADER.exists() and _which("ip") is not None
    if os.environ.get("CI") == "1" and not has_all:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, text=True
            )
            if done.returncode != 0:
                return f"{INSTALLATION_FAILED} {command[0]}: {done.stderr.strip()[-300:]}"
        missing = [name for name in DAEMONS if _which(name) is None]
    if missing:
        packages = " ".join(PACKAGES)
        return f"{', '.join(missing)} missing: apt-get install {packages}, or CI=1 to have it done"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class LocalSlurm:
    """The daemons; enter it as a context.

    Args:
        network: of its nodes.
    """

    def __init__(self, network: Network) -> None:
        # Unix sockets have short names, so not below pytest's own folders.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes, self._network = network.nodes, network
        self.has_pyxis = False
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> "LocalSlurm":
        self._before["SLURM_CONF"] = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.root / "slurm.conf")
        try:
            self._network.open(self.root)
            self._write_files()
            self._start("munged", *self._munged())
            self._until(lambda: (self.root / "munge.sock").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for node in self.nodes:
                self.start_node(node)
            self._until(lambda: self.idle() == len(self.nodes), "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
        for name in reversed(self._processes):
            self._end(name)
        self._network.close()
        os.environ.pop("SLURM_CONF")
        if (before := self._before["SLURM_CONF"]) is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(self.root, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start, or start again, a node's slurmd."""
        self._start(node, "-D", "-N", node, program="slurmd", where=node)

    def restart_node(self, node: str) -> None:
        """End a node's slurmd if there is one, start it, and wait until all nodes are idle."""
        if node in self._processes:
            self._end(node)
        self.start_node(node)
        self._until(lambda: self.idle() == len(self.nodes), node)

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's slurmd and all that runs on the node, as when a machine is gone."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()
        tasks = [pid for pid, text in _environments() if f"SLURMD_NODENAME={node}\0" in text]
        for pid in {*tasks, *filter(_is_stepd, map(_parent, tasks))}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def standstill(self, job: str) -> Iterator[None]:
        """A job's ranks do nothing meanwhile: stopped, again and again, as Slurm continues them."""
        ranks = [
            pid
            for pid, text in _environments()
            if f"SLURM_JOB_ID={job}\0" in text and "\0RANK=" in text
        ]
        over = threading.Event()

        def stop() -> None:
            while not over.wait(0.002):
                for pid in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)

        stopping = threading.Thread(target=stop)
        stopping.start()
        try:
            yield
        finally:
            over.set()
            stopping.join()

    def idle(self) -> int:
        """How many nodes are idle."""
        done = subprocess.run(
            ["sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D"], capture_output=True, text=True
        )
        return int(done.stdout.strip() or 0)

    def clear(self) -> None:
        """Cancel all jobs and wait until their processes are gone."""
        if "slurmctld" not in self._processes:
            return
        for _ in range(120):
            subprocess.run(["scancel", "--user", str(os.getuid())], capture_output=True)
            listed = subprocess.run(["squeue", "-h"], capture_output=True, text=True)
            if not listed.stdout.strip():
                return
            time.sleep(0.25)

    def _write_files(self) -> None:
        port = free_ports(1 + len(self.nodes))
        for folder in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        text = CONF.format(
            controller=self._network.controller,
            user=_user(),
            root=self.root,
            port=port,
            silence_s=self._network.silence_s,
            nodes=self._network.lines.format(first=port + 1, last=port + len(self.nodes)),
            # Ports of a run follow from the job: two of these clusters must not share any.
            first_job=secrets.randbelow(50_000) + 1,
        )
        (self.root / "slurm.conf").write_text(text)
        plugin = self._pyxis_stub()
        (self.root / "plugstack.conf").write_text(f"required {plugin}\n" if plugin else "")
        for number in range(8):
            (self.root / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-7]\n")
        # No control group is touched; this version cannot do without the plugin.
        cgroup = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.root}/none\n"
        (self.root / "cgroup.conf").write_text(cgroup)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def _pyxis_stub(self) -> Path | None:
        """The plugin that stands for pyxis, where it can be compiled."""
        if shutil.which("cc") is None or not HEADER.exists():
            return None
        plugin = self.root / "pyxis_stub.so"
        source = Path(__file__).parent / "pyxis_stub.c"
        subprocess.run(
            ["cc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", plugin, source],
            check=True,
        )
        self.has_pyxis = True
        return plugin

    def _munged(self) -> list[str]:
        root = self.root
        return [
            "--foreground",
            "--force",
            f"--key-file={root}/munge.key",
            f"--socket={root}/munge.sock",
            f"--pid-file={root}/munged.pid",
            f"--log-file={root}/munged.log",
            f"--seed-file={root}/munge.seed",
        ]

    def _start(
        self, name: str, *arguments: str, program: str | None = None, where: str | None = None
    ) -> None:
        path = _which(program or name)
        assert path is not None
        with (self.root / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [*self._network.inside(where), path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        process = self._processes[name]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
            return
        process.kill()
        process.wait()

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not holds():
            if time.monotonic() > deadline:
                logs = sorted(self.root.glob("*.log")) + sorted(self.root.glob("*.out"))
                told = "\n".join(f"{path.name}:\n{path.read_text()[-800:]}" for path in logs)
                raise TimeoutError(f"{what} did not start\n{told}")
            time.sleep(0.1)


def free_ports(count: int) -> int:
    """The first of some ports in a row that are free now."""
    for first in range(27000, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held = stack.enter_context(socket.socket())
                held.bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


def _environments() -> Iterator[tuple[int, str]]:
    """Processes of jobs of this Slurm, with their environments."""
    mine = f"SLURM_CONF={os.environ['SLURM_CONF']}\0"
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            text = path.read_text(errors="replace")
            if mine in text and "SLURM_JOB_ID=" in text:
                yield int(path.parent.name), text


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _is_stepd(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")
    return False


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
