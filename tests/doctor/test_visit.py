"""Several real processes that meet, some of them with something wrong."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow(reason="starts several interpreters with torch")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def start(
    rank: int, count: int, port: int, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """One of ``count`` tasks, on a node of its own by name."""
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_apo", "doctor", *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(count),
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "1",
            "SLURMD_NODENAME": f"n{rank}",
            "NEMO_APO_NODES": " ".join(f"n{number}" for number in range(count)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            **environment,
        },
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(process.wait(200), process.communicate()[0]) for process in processes]


def test_nodes_that_are_fit(tmp_path: Path) -> None:
    port = free_port()
    first, second = ended([start(rank, 2, port, "--shared", str(tmp_path)) for rank in range(2)])
    assert (first[0], second) == (0, (0, "")), first[1]
    for check in ("versions", "clock", "shared folder", "gloo"):
        line = next(line for line in first[1].splitlines() if check in line)
        assert line.startswith("ok")
        assert "n0,n1" in line
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    # The same path, and another folder in every process.
    for name in ("a", "b"):
        (tmp_path / name / "runs").mkdir(parents=True)
    port, shared = free_port(), ("--shared", "/proc/self/cwd/runs", "--seconds", "60")
    first, second = ended(
        [start(rank, 2, port, *shared, cwd=tmp_path / "ab"[rank]) for rank in range(2)]
    )
    assert (first[0], second[0]) == (1, 1)
    assert "does not show what n1 wrote" in first[1]
    assert "does not show what n0 wrote" in first[1]
    assert "must be one file system on all nodes" in first[1]


def test_a_node_that_does_not_come_is_named_in_time() -> None:
    started = time.monotonic()
    ((status, told),) = ended([start(0, 2, free_port(), "--seconds", "12")])
    assert status == 1
    assert "FAILURE  present" in told
    assert "n1" in told
    assert "did not come" in told
    assert time.monotonic() - started < 120


def test_a_wrong_address_is_told_by_the_node_that_has_it() -> None:
    wrong = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ((status, told),) = ended([start(1, 2, 0, "--seconds", "10", **wrong)])
    assert status == 1
    assert f"cannot reach 127.0.0.1:{wrong['MASTER_PORT']} from here" in told
    assert "is n0 up, and does MASTER_ADDR name it" in told


def test_an_address_that_is_not_the_first_nodes_is_told_by_it() -> None:
    # No connection goes there, and no packet either.
    wrong = {"MASTER_ADDR": "255.255.255.255"}
    ((status, told),) = ended([start(0, 2, free_port(), "--seconds", "10", **wrong)])
    assert status == 1
    assert "cannot reach 255.255.255.255" in told
    assert "MASTER_ADDR must name this node" in told


def test_different_versions_are_named(tmp_path: Path) -> None:
    metadata = tmp_path / "vllm-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0.1\n")
    port = free_port()
    first, second = ended(
        [start(0, 2, port), start(1, 2, port, PYTHONPATH=f"{REPOSITORY}:{tmp_path}")]
    )
    assert (first[0], second[0]) == (1, 1)
    assert "vllm 0.0.1 against missing" in first[1]
