import socket

import pytest

from nemo_apo.config import ConfigError
from nemo_apo.doctor.place import find_place

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "12",
    "SLURMD_NODENAME": "n2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "NEMO_APO_NODES": "n1 n2",
}


def test_alone() -> None:
    place = find_place({})
    assert (place.rank, place.world_size, place.node) == (0, 1, socket.gethostname())


def test_a_task_of_a_step() -> None:
    place = find_place(STEP)
    assert (place.rank, place.world_size, place.local_rank, place.node) == (3, 4, 1, "n2")
    assert (place.address, place.port, place.hosts_store) == ("n1", 20025, False)
    assert place.nodes == ("n1", "n1", "n2", "n2")
    assert find_place({**STEP, "SLURM_PROCID": "0"}).hosts_store
    assert find_place({**STEP, "MASTER_ADDR": "a", "MASTER_PORT": "5"}).port == 5


def test_one_host_needs_no_scontrol() -> None:
    alone = {key: value for key, value in STEP.items() if key != "NEMO_APO_NODES"}
    assert find_place({**alone, "SLURM_JOB_NODELIST": "n7"}).nodes == ("n7",) * 4


@pytest.mark.parametrize(("agent", "hosts"), [("True", False), ("False", True)])
def test_torchrun(agent: str, hosts: bool) -> None:
    environment = {
        **STEP,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": agent,
    }
    place = find_place(environment)
    assert (place.world_size, place.address, place.hosts_store) == (2, "h", hosts)
    assert place.node_of(1) == "rank 1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK=x: must be a whole number"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x"),
    ],
)
def test_an_incomplete_environment(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_place({**STEP, **changes})
