"""The launcher of a node's ranks, with real processes in the place of training."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
# A stand-in for the package's own __main__: what the ranks run.
RANK = """\
import os, signal, sys, time
rank, (mode, *_) = int(os.environ["RANK"]), sys.argv[1:]
if mode == "statuses":
    sys.exit(75)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "signal":
    open(f"ready{rank}", "w").close()
    deadline = time.monotonic() + 100
    while signal.SIGUSR1 not in signal.sigpending():
        if time.monotonic() > deadline:
            sys.exit(3)
        time.sleep(0.05)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    time.sleep(30)
"""

pytestmark = pytest.mark.slow(reason="starts interpreters with torch")


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    """The launcher of a job of one node with two ranks."""
    package = folder / "nemo_apo"
    (package / "launch").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch" / "__init__.py").touch()
    (package / "__main__.py").write_text(RANK)
    node = REPOSITORY / "nemo_apo" / "launch" / "node.py"
    (package / "launch" / "node.py").write_text(node.read_text())
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_apo.launch.node", "2", *command],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("mode", "status"), [("statuses", 75), ("killed", 137), ("fine", 0)])
def test_the_status_is_that_of_the_ranks(mode: str, status: int, tmp_path: Path) -> None:
    process = start(tmp_path, mode)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == status, told


def test_signals_are_outlived_and_kept_for_the_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "signal")
    deadline = time.monotonic() + 300
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The ranks do not listen yet, and the signal comes to their launcher alone.
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 75, told


def test_a_signal_before_there_are_ranks_is_passed_on(tmp_path: Path) -> None:
    process = start(tmp_path, "signal")
    status = Path(f"/proc/{process.pid}/status")
    blocked = 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 60
    while not int(re.findall(r"SigBlk:\t(\w+)", status.read_text())[0], 16) & blocked:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 75, told


def test_a_stop_before_the_start_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop").touch()
    monkeypatch.setenv("NEMO_APO_STOP_FILE", str(tmp_path / "stop"))
    process = start(tmp_path, "signal")
    assert "told to stop" in process.communicate(timeout=300)[1]
    assert process.returncode == 75
    assert not list(tmp_path.glob("ready*"))
