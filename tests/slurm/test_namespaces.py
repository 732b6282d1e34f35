"""Jobs on nodes with addresses and host names of their own: wrong addresses, lost machines."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_apo import record
from tests.abuse.effort import IS_LONG, report

from . import jobs
from .cluster import LocalSlurm
from .networks import Namespaces

pytestmark = pytest.mark.slow(reason="trains in jobs of a real Slurm")

# No GLOO_SOCKET_IFNAME: gloo is to find the nodes' own addresses by their host names.
ENVIRONMENT = f"cluster.environment=['PYTHONPATH={jobs.REPOSITORY}','OMP_NUM_THREADS=1']"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
# A node of which nothing is heard any more: it goes on alone, or nothing of it is left. The first
# one has the job's script, rank 0 and the store of the ranks.
LOSSES = [("n2", "cut off"), ("n2", "dead"), ("n1", "cut off")] if IS_LONG else [("n2", "cut off")]
# What is said, and on which of the job's nodes, before Slurm knows.
SAID = {
    "n1": (1, "the store of the process group does not answer"),
    "n2": (0, "rank 1 (n2, process"),
}


@pytest.fixture(scope="module")
def whole(spread_slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on two nodes, which were checked first."""
    folder = tmp_path_factory.mktemp("whole")
    done = jobs.launch(folder, ENVIRONMENT, "run.name=whole", "cluster.doctor=true", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr + jobs.logs(folder)
    return folder / "runs" / "whole"


@pytest.fixture
def unplug(spread_slurm: LocalSlurm, network: Namespaces) -> Iterator[Callable[[str], None]]:
    """Cuts a node off; it is back afterwards."""
    cut: list[str] = []

    def unplug(node: str) -> None:
        cut.append(node)
        network.unplug(node)

    yield unplug
    for node in cut:
        network.plug_in(node)
    spread_slurm.clear()
    for node in cut:
        spread_slurm.restart_node(node)


def test_ranks_meet_by_the_name_of_the_first_node(whole: Path) -> None:
    summary = json.loads((whole / record.SUMMARY_FILE).read_text())
    assert (summary["world_size"], summary["data_parallel_size"]) == (2, 2)
    (doctor,) = whole.glob("slurm/*/*/start0-doctor-node0.log")
    told = doctor.read_text()
    assert "FAILURE" not in told
    assert "n1,n2" in told


def test_a_start_that_fails_leaves_nothing(
    network: Namespaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "ip"
    real = shutil.which("ip")
    failing.write_text(f'#!/bin/sh\ncase "$*" in *10.77.0.12*) exit 1 ;; esac\nexec {real} "$@"\n')
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = (os.readlink("/proc/thread-self/ns/net"), os.environ.get("SLURM_CONF"))
    namespaces, processes = Namespaces(2), children()
    with pytest.raises(subprocess.CalledProcessError), LocalSlurm(namespaces):
        pass
    assert (os.readlink("/proc/thread-self/ns/net"), os.environ.get("SLURM_CONF")) == before
    assert children() == processes


def children() -> set[str]:
    """The processes that this one has started and not seen end."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_a_wrong_address_ends_the_job_and_is_named(
    spread_slurm: LocalSlurm, tmp_path: Path
) -> None:
    cures = {
        # Of nobody, of a node of no concern, of every node to itself.
        "10.77.0.99": "MASTER_ADDR must name this node",
        "n3": "MASTER_ADDR must name this node",
        "127.0.0.2": "is n1 up, and does MASTER_ADDR name it for this node",
    }
    submitted = {
        address: jobs.launched(
            tmp_path,
            *(ENVIRONMENT, f"run.name=to-{address}", f"cluster.master_addr={address}"),
            *("cluster.doctor=true", "cluster.doctor_seconds=10"),
        )
        for address in cures
    }
    for address, job in submitted.items():
        found = jobs.wait_for(job, tmp_path, *ENDED)
        folder = tmp_path / "runs" / f"to-{address}"
        told = jobs.logs(folder)
        assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0"), told
        (log,) = folder.glob("slurm/*/*.log")
        said = log.read_text()
        assert f"cannot reach {address}:" in said
        assert cures[address] in said
        assert "a node is not fit for the run (status 1)" in said
        assert not (folder / record.METRICS_FILE).exists()


@pytest.mark.parametrize(("node", "loss"), LOSSES)
def test_a_lost_machine_is_survived(
    node: str,
    loss: str,
    spread_slurm: LocalSlurm,
    unplug: Callable[[str], None],
    whole: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "run"
    arguments = ("run.name=run", "run.save_every=1", "parallel.timeout_minutes=0.1")
    job = jobs.launched(tmp_path, ENVIRONMENT, *arguments)
    jobs.wait_for_step(folder, 2)
    unplug(node)
    if loss == "dead":
        spread_slurm.kill_node(node)
    found = jobs.wait_for(job, tmp_path, *ENDED)
    told = jobs.logs(tmp_path)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1")
    left = " ".join(name for name in spread_slurm.nodes if name != node)
    assert f"start 1: nodes {left}" in told
    assert "resumed from" in told
    index, what = SAID[node]
    (log,) = folder.glob(f"slurm/*/*/start0-train-node{index}.log")
    assert what in log.read_text()
    assert jobs.metrics(folder) == jobs.metrics(whole)
    report(f"{node} {loss}", 1)


def test_a_machine_lost_before_the_first_step_is_named(
    spread_slurm: LocalSlurm, unplug: Callable[[str], None], tmp_path: Path
) -> None:
    unplug("n2")  # which Slurm does not know yet
    job = jobs.launched(tmp_path, ENVIRONMENT, "run.name=run", "cluster.doctor=true")
    jobs.wait_until(lambda: "start 1: nodes n1 n3" in jobs.logs(tmp_path), "the next", tmp_path)
    assert "start 0: n2 does not answer" in jobs.logs(tmp_path)
    assert jobs.fields(job)["Restarts"] == "1"


def test_a_machine_lost_before_the_meeting_is_named(
    spread_slurm: LocalSlurm, unplug: Callable[[str], None], tmp_path: Path
) -> None:
    arguments = ("run.name=run", "cluster.doctor=true", "cluster.doctor_seconds=10")
    jobs.launched(tmp_path, ENVIRONMENT, *arguments)
    logs = "runs/run/slurm/*/*/start0-doctor-node{}.log"
    jobs.wait_until(lambda: any(tmp_path.glob(logs.format(1))), "its task", tmp_path)
    unplug("n2")
    (first,) = tmp_path.glob(logs.format(0))
    jobs.wait_until(lambda: "FAILURE" in first.read_text(), "the findings", tmp_path)
    assert "present   n2  did not come to the meeting" in first.read_text()
