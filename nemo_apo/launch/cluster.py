"""The settings of a cluster: a file of ``conf/cluster`` or one's own, and ``cluster.KEY=VALUE``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import Schema, assigned, first_line, suggestion, typed_section
from nemo_apo.compose.schema import unknown_key as unknown
from nemo_apo.config import ConfigError, require
from nemo_apo.planning.settings import GPU_MEMORY

CLUSTER = "cluster"
DEFAULT = "gpu"
# Names of environment variables whose values are secrets.
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
_TIME = re.compile(r"\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2}")
_OWN = ("localhost", "127.0.0.1", "::1")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\n]*")


@dataclass(frozen=True)
class Cluster:
    """How a job runs on Slurm.

    Attributes:
        account, partition, qos: of the job; null is the cluster's default.
        time: limit of one job, as Slurm writes it ("minutes", "hours:minutes:seconds" or
            "days-hours:minutes:seconds").
        nodes: machines.
        gpus_per_node: GPUs of each, one rank for each GPU; 0 is a job without GPUs.
        processes_per_node: ranks of a node without GPUs; null where there are GPUs.
        gpu: "h100" or "h200", to refuse a run whose computed memory exceeds it; null asks nothing.
        cpus_per_task: CPU cores of a node for its ranks together; null is the cluster's default.
        mem: memory of a node ("200G", "0" is all of it); null is the cluster's default.
        exclusive: no other job on the nodes.
        signal_before: seconds before the limit at which the run is stopped, saved and requeued; 0
            sends no signal.
        requeue: go on by requeueing the job after it stopped early, and let Slurm requeue it after
            a preemption or a lost node.
        chain: jobs submitted at once, one after the other (``--dependency=singleton``); with
            several, the next job goes on after one that stopped early, and none is requeued for it.
        stalled_starts: starts in a row without a new checkpoint after which the job ends.
        container: image for pyxis (``srun --container-image``); null runs without one.
        mounts: "/host:/container" for it; working directory, run folder and env_file are mounted
            anyway, at the same place.
        python: interpreter on the nodes; null is the one of this command, or ``python`` in a
            container.
        workdir: where the job runs; null is where this command was started.
        env_file: shell file of ``NAME=VALUE`` lines that the tasks read on the nodes, for secrets.
        environment: "NAME=VALUE" for everything else, such as NCCL's settings.
        mpi: of srun, such as "none" or "pmix"; null is the cluster's default.
        master_addr: address of the ranks' store; null is the job's first host.
        logs: parent of the launch folders; null is ``slurm`` in the run's folder.
        extra_sbatch: further options of sbatch, each as it stands on its line.
        doctor: check every node before training (``nemo-apo doctor``).
        doctor_seconds: longest time for that.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = "04:00:00"
    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int | None = None
    gpu: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool = False
    signal_before: int = 300
    requeue: bool = True
    chain: int = 1
    stalled_starts: int = 3
    container: str | None = None
    mounts: tuple[str, ...] = ()
    python: str | None = None
    workdir: str | None = None
    env_file: str | None = None
    environment: tuple[str, ...] = ()
    mpi: str | None = None
    master_addr: str | None = None
    logs: str | None = None
    extra_sbatch: tuple[str, ...] = ()
    doctor: bool = True
    doctor_seconds: int = 120

    def __post_init__(self) -> None:
        # OmegaConf reads lists, which would leave a configuration without a hash.
        for key in ("mounts", "environment", "extra_sbatch"):
            object.__setattr__(self, key, tuple(getattr(self, key)))

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.gpus_per_node or self.processes_per_node or 0

    @property
    def ranks(self) -> int:
        """Ranks of a job."""
        return self.nodes * self.ranks_per_node


SCHEMA = Schema({CLUSTER: {"": Cluster()}})


def cluster_names() -> list[str]:
    """The shipped clusters."""
    return sorted(path.stem for path in (conf_dir() / CLUSTER).glob("*.yaml"))


def read_cluster(overrides: Sequence[str]) -> tuple[Cluster, list[str]]:
    """The cluster by ``cluster=NAME`` and ``cluster.KEY=VALUE``, and the other overrides.

    ``cluster=FILE.yaml`` is a file of one's own, of keys that differ from the default.

    Raises:
        ConfigError: naming key, value and rule.
    """
    named: object = DEFAULT
    values: dict[str, Any] = {}
    others = []
    for text in overrides:
        key = text.partition("=")[0]
        if key != CLUSTER and not key.startswith(f"{CLUSTER}."):
            others.append(text)
            continue
        value = _value(text)
        if key == CLUSTER:
            named = value
        else:
            values[key.partition(".")[2]] = value
    cluster: Cluster = typed_section(CLUSTER, {**_file(named), **values}, SCHEMA)
    _check(cluster)
    return cluster, others


def _value(text: str) -> Any:
    key = text.partition("=")[0]
    if key not in [CLUSTER, *SCHEMA.all_keys()]:
        raise ConfigError(unknown(key, "", [CLUSTER, *SCHEMA.all_keys()]))
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        written = text.partition("=")[2]
        raise ConfigError(
            f"{text}: cannot be read; a value with special characters needs quotes inside "
            f"quotes: {key}=\"'{written}'\", in a list too: {key}=\"['A=1','B=2']\""
        ) from None
    if override.is_sweep_override():
        raise ConfigError(f"{text}: takes one value; a list is written {key}=[A,B]")
    return override.value()


def _file(named: object) -> dict[str, Any]:
    """The values of a shipped cluster, or of a file of one's own."""
    if isinstance(named, str) and named.endswith((".yaml", ".yml")):
        path = Path(named)
    elif named in cluster_names():
        path = conf_dir() / CLUSTER / f"{named}.yaml"
    else:
        near = suggestion(str(named), cluster_names())
        rule = f"must be one of {', '.join(cluster_names())}, or a file that ends in .yaml{near}"
        raise ConfigError(f"{assigned(CLUSTER, named)}: {rule}")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{assigned(CLUSTER, named)}: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{assigned(CLUSTER, named)}: must hold a mapping of keys")
    return {str(key): value for key, value in tree.items()}


def _check(cluster: Cluster) -> None:
    _check_size(cluster)
    require(_TIME.fullmatch(cluster.time) is not None, "cluster.time", cluster.time, _TIME_RULE)
    for name in ("account", "partition", "qos", "mem", "mpi", "master_addr", "container"):
        value = getattr(cluster, name)
        one_word = value is None or (value != "" and not re.search(r"\s", value))
        require(one_word, f"cluster.{name}", value, "must be one word, or null")
    for option in cluster.extra_sbatch:
        fits = option.startswith("-") and "\n" not in option
        require(fits, "cluster.extra_sbatch", option, "must be options, such as --constraint=h100")
    _check_environment(cluster.environment)
    _check_mounts(cluster)


_TIME_RULE = "must be as Slurm writes it, such as 04:00:00 or 1-12:00:00"


def _check_size(cluster: Cluster) -> None:
    least = {"nodes": 1, "gpus_per_node": 0, "signal_before": 0, "chain": 1, "stalled_starts": 1}
    for key, minimum in {**least, "doctor_seconds": 10}.items():
        value = getattr(cluster, key)
        require(value >= minimum, f"cluster.{key}", value, f"must be at least {minimum}")
    for key in ("processes_per_node", "cpus_per_task"):
        value = getattr(cluster, key)
        require(value is None or value >= 1, f"cluster.{key}", value, "must be at least 1, or null")
    per_node = cluster.processes_per_node
    if cluster.gpus_per_node > 0:
        rule = (
            f"must be null: every one of cluster.gpus_per_node={cluster.gpus_per_node} has a rank"
        )
        require(per_node is None, "cluster.processes_per_node", per_node, rule)
    else:
        rule = "must say how many ranks a node has, as cluster.gpus_per_node=0"
        require(per_node is not None, "cluster.processes_per_node", "null", rule)
    address = cluster.master_addr
    rule = "leads every node to itself; null is the job's first host"
    require(cluster.nodes == 1 or address not in _OWN, "cluster.master_addr", address, rule)
    if cluster.gpu is not None:
        known = ", ".join(GPU_MEMORY)
        require(cluster.gpu in GPU_MEMORY, "cluster.gpu", cluster.gpu, f"must be one of {known}")


def _check_environment(environment: tuple[str, ...]) -> None:
    for entry in environment:
        fits = _VARIABLE.fullmatch(entry) is not None
        require(fits, "cluster.environment", entry.partition("=")[0], "must be NAME=VALUE")
        name = entry.partition("=")[0]
        rule = "looks like a secret, which would stand in the job script; write it into a file and "
        rule += "name that by cluster.env_file"
        require(SECRET_NAME.search(name) is None, "cluster.environment", name, rule)


def _check_mounts(cluster: Cluster) -> None:
    if cluster.container is None:
        rule = "mounts are a container's, and cluster.container is null"
        require(not cluster.mounts, "cluster.mounts", ",".join(cluster.mounts), rule)
    for mount in cluster.mounts:
        parts = mount.split(":")
        fits = 1 <= len(parts) <= 3 and all(part.startswith("/") for part in parts[:2])
        fits = fits and not re.search(r"[\s,]", mount)
        require(fits, "cluster.mounts", mount, "must be /host:/container, with absolute paths")
    file = cluster.env_file
    if file is not None:
        require(file.startswith("/"), "cluster.env_file", file, "must be an absolute path")
        require(Path(file).is_file(), "cluster.env_file", file, "there is no such file")
