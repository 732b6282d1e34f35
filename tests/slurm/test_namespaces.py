"""Jobs on nodes with addresses and host names of their own: wrong addresses, lost machines."""

import json
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
# A node of which nothing is heard any more: it goes on alone, or nothing of it is left.
LOSSES = ["cut off", "dead"] if IS_LONG else ["cut off"]


@pytest.fixture(scope="module")
def whole(spread_slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on two nodes, which were checked first."""
    folder = tmp_path_factory.mktemp("whole")
    done = jobs.launch(folder, ENVIRONMENT, "run.name=whole", "cluster.doctor=true", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr + jobs.logs(folder)
    return folder / "runs" / "whole"


@pytest.fixture
def unplugged(spread_slurm: LocalSlurm, network: Namespaces) -> Iterator[Callable[[], None]]:
    """Cuts the second node off; it is back afterwards."""
    yield lambda: network.unplug("n2")
    network.plug_in("n2")
    spread_slurm.clear()
    spread_slurm.restart_node("n2")


def test_ranks_meet_by_the_name_of_the_first_node(whole: Path) -> None:
    summary = json.loads((whole / record.SUMMARY_FILE).read_text())
    assert (summary["world_size"], summary["data_parallel_size"]) == (2, 2)
    (doctor,) = whole.glob("slurm/*/*/start0-doctor-node0.log")
    told = doctor.read_text()
    assert "FAILURE" not in told
    assert "n1,n2" in told


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


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_machine_is_survived(
    loss: str,
    spread_slurm: LocalSlurm,
    unplugged: Callable[[], None],
    whole: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "run"
    arguments = ("run.name=run", "run.save_every=1", "parallel.timeout_minutes=0.1")
    job = jobs.launched(tmp_path, ENVIRONMENT, *arguments)
    jobs.wait_for_step(folder, 2)
    unplugged()
    if loss == "dead":
        spread_slurm.kill_node("n2")
    found = jobs.wait_for(job, tmp_path, *ENDED)
    told = jobs.logs(tmp_path)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "start 1: nodes n1 n3" in told
    assert "resumed from" in told
    # By the other rank, before Slurm knew.
    (first,) = folder.glob("slurm/*/*/start0-train-node0.log")
    assert "rank 1 (n2, process" in first.read_text()
    assert jobs.metrics(folder) == jobs.metrics(whole)
    report(f"a machine {loss}", 1)


def test_a_machine_lost_before_the_first_step_is_named(
    spread_slurm: LocalSlurm, unplugged: Callable[[], None], tmp_path: Path
) -> None:
    unplugged()  # which Slurm does not know yet
    job = jobs.launched(tmp_path, ENVIRONMENT, "run.name=run", "cluster.doctor=true")
    jobs.wait_until(lambda: "start 1: nodes n1 n3" in jobs.logs(tmp_path), "the next", tmp_path)
    assert "start 0: n2 does not answer" in jobs.logs(tmp_path)
    assert jobs.fields(job)["Restarts"] == "1"


def test_a_machine_lost_before_the_meeting_is_named(
    spread_slurm: LocalSlurm, unplugged: Callable[[], None], tmp_path: Path
) -> None:
    arguments = ("run.name=run", "cluster.doctor=true", "cluster.doctor_seconds=10")
    jobs.launched(tmp_path, ENVIRONMENT, *arguments)
    logs = "runs/run/slurm/*/*/start0-doctor-node{}.log"
    jobs.wait_until(lambda: any(tmp_path.glob(logs.format(1))), "its task", tmp_path)
    unplugged()
    (first,) = tmp_path.glob(logs.format(0))
    jobs.wait_until(lambda: "FAILURE" in first.read_text(), "the findings", tmp_path)
    assert "present   n2  did not come to the meeting" in first.read_text()
