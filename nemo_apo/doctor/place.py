"""Where this process stands: rank, node and meeting point, by torchrun's or srun's environment."""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_apo.config import ConfigError

# Where the environment names no port; the same on every node of a job.
_FIRST_PORT = 20001


@dataclass(frozen=True)
class Place:
    """A process among the others.

    Attributes:
        rank, world_size, local_rank: as usual.
        node: name of the machine, in the scheduler's words where there is one.
        address, port: where the processes meet; unused by a single one.
        hosts_store: whether this process opens the meeting point.
        nodes: name of every rank's node, as far as it is known before they have met.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str
    address: str
    port: int
    hosts_store: bool
    nodes: tuple[str, ...]

    def node_of(self, rank: int) -> str:
        """What to call a rank that has not been heard of."""
        return self.nodes[rank] if rank < len(self.nodes) else f"rank {rank}"


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place.

    Raises:
        ConfigError: for an environment that is incomplete or not whole numbers.
    """
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" in environment:
        rank, world_size, local_rank = _numbers(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        (port,) = _numbers(environment, "MASTER_PORT")
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address = environment.get("MASTER_ADDR", "")
        return Place(
            rank, world_size, local_rank, node, address, port, rank == 0 and not has_store, ()
        )
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
        return _in_step(environment, node)
    return Place(0, 1, 0, node, "", 0, False, (node,))


def _in_step(environment: Mapping[str, str], node: str) -> Place:
    """The place of a task of srun; ranks stand in blocks, as srun lays them out by default."""
    rank, world_size, local_rank = _numbers(
        environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    )
    if world_size == 1:
        return Place(0, 1, 0, node, "", 0, False, (node,))
    hosts = _hostnames(environment)
    per_node = -(-world_size // len(hosts))
    (job,) = _numbers(environment, "SLURM_JOB_ID")
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        node=node,
        address=environment.get("MASTER_ADDR") or hosts[0],
        port=int(environment.get("MASTER_PORT") or _FIRST_PORT + 2 * (job % 20000)),
        hosts_store=rank == 0,
        nodes=tuple(hosts[rank // per_node] for rank in range(world_size)),
    )


def _hostnames(environment: Mapping[str, str]) -> list[str]:
    if "NEMO_APO_NODES" in environment:  # from the script of a job: a container has no scontrol
        return environment["NEMO_APO_NODES"].split()
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    if not set("[,") & set(nodelist):
        return [nodelist]
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        rule = "without scontrol, name the job's hosts, separated by blanks"
        raise ConfigError(f"NEMO_APO_NODES=: {rule} ({error})") from None
    return done.stdout.split()


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    for name in names:
        value = environment.get(name, "")
        if not value.isdecimal():
            raise ConfigError(f"{name}={value}: must be a whole number")
    return [int(environment[name]) for name in names]
