"""The job script: options of sbatch, this launch's values, and the part that all jobs share."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_apo.launch.cluster import Cluster
from nemo_apo.launch.sweep import Element

SHARED_PART = Path(__file__).parent / "job.sh"
_DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})\b")


@dataclass(frozen=True)
class Launch:
    """What one command submits.

    Attributes:
        cluster: the settings.
        name: of the run, or of the sweep.
        arguments: of ``nemo-apo train``, for every run.
        tokens: environment variables that the run needs.
        readable: paths that it reads on every node.
        elements: the runs of a sweep, empty for a single one.
        root: folder of the run folders, absolute.
        folder: of this launch, for its script, logs and state, absolute.
        workdir: where the job runs, absolute.
        python: interpreter on the nodes.
    """

    cluster: Cluster
    name: str
    arguments: tuple[str, ...]
    tokens: tuple[str, ...]
    readable: tuple[str, ...]
    elements: tuple[Element, ...]
    root: Path
    folder: Path
    workdir: Path
    python: str

    @property
    def run_folders(self) -> list[Path]:
        """Where the runs go."""
        if not self.elements:
            return [self.root / self.name]
        return [self.root / self.name / element.name for element in self.elements]


def image_digest(container: str | None) -> str | None:
    """The digest that an image's reference states; None where it states none."""
    found = _DIGEST.search(container or "")
    return found[1] if found else None


def render(launch: Launch) -> str:
    """The job script."""
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in _options(launch)),
        "",
        f"# Trains {launch.name}; written by `nemo-apo launch slurm`.",
        "# Status: 0 the run has ended, 1 it failed, 2 it was refused, 75 it stopped early and",
        "# goes on later, 76 start after start made no progress.",
        "set -euo pipefail",
        "",
        *_values(launch),
        "",
        *_arguments(launch),
    ]
    return "\n".join(lines) + "\n\n" + SHARED_PART.read_text(encoding="utf-8")


def render_report(launch: Launch, arrays: Sequence[str]) -> str:
    """The script of the job that makes a sweep's report once the jobs of the arrays have ended."""
    cluster = launch.cluster
    options = [
        f"--job-name=nemo_apo-{launch.name}-report",
        *_asked(("account", "partition", "qos"), cluster),
        "--time=00:30:00",
        "--nodes=1",
        "--ntasks=1",
        f"--chdir={launch.workdir}",
        f"--output={launch.folder}/report-%j.log",
        "--export=NONE",
        f"--dependency=afterany:{':'.join(arrays)}",
    ]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in options),
        "",
        f"# The report of the sweep {launch.name}, over the runs that have left something.",
        "set -euo pipefail",
        "",
        *_list("runs", [str(folder) for folder in launch.run_folders]),
        *_list("srun_options", _srun_options(launch)),
        "",
        "found=()",
        'for run in "${runs[@]}"; do',
        "    if [[ -f $run/metrics.jsonl ]]; then",
        '        found+=("$run")',
        "    else",
        '        echo "$run: has left no metrics" >&2',
        "    fi",
        "done",
        "export SLURM_EXPORT_ENV=ALL",
        *(f"export {shlex.quote(entry)}" for entry in cluster.environment),
        f"python={shlex.quote(launch.python)}",
        'srun --ntasks=1 "${srun_options[@]}" "$python" -m nemo_apo report "${found[@]}" \\',
        f"    --out {shlex.quote(str(launch.root / launch.name))}",
        "((${#found[@]} == ${#runs[@]}))",
    ]
    return "\n".join(lines) + "\n"


def _options(launch: Launch) -> list[str]:
    """Options of sbatch, each for a line of its own."""
    cluster = launch.cluster
    options = [
        f"--job-name=nemo_apo-{launch.name}",
        *_asked(("account", "partition", "qos"), cluster),
        f"--time={cluster.time}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        *_asked(("cpus_per_task",), cluster),
    ]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    options += _asked(("mem",), cluster)
    if cluster.exclusive:
        options.append("--exclusive")
    if cluster.signal_before:
        options.append(f"--signal=B:USR1@{cluster.signal_before}")
    options.append("--requeue" if cluster.requeue else "--no-requeue")
    if cluster.chain > 1:
        options.append("--dependency=singleton")
    if launch.elements:
        options.append(f"--array=0-{len(launch.elements) - 1}")
    job = "%A_%a" if launch.elements else "%j"
    options += [
        f"--chdir={launch.workdir}",
        f"--output={launch.folder}/{job}.log",
        "--open-mode=append",
        "--export=NONE",
    ]
    return [*options, *cluster.extra_sbatch]


def _asked(keys: Sequence[str], cluster: Cluster) -> list[str]:
    values = ((key, getattr(cluster, key)) for key in keys)
    return [f"--{key.replace('_', '-')}={value}" for key, value in values if value is not None]


def _values(launch: Launch) -> list[str]:
    cluster = launch.cluster
    values = {
        "launch": launch.folder,
        "python": launch.python,
        "ranks_per_node": cluster.ranks_per_node,
        "env_file": cluster.env_file or "",
        "image": cluster.container or "",
        "master_addr": cluster.master_addr or "",
        "requeue": str(cluster.requeue).lower(),
        "chain": cluster.chain,
        "stalled_starts": cluster.stalled_starts,
        "doctor": str(cluster.doctor).lower(),
        "doctor_seconds": cluster.doctor_seconds,
    }
    return [
        *(f"{name}={shlex.quote(str(value))}" for name, value in values.items()),
        *_list("srun_options", _srun_options(launch)),
        *_list("doctor_options", _doctor_options(launch)),
        *(f"export {shlex.quote(entry)}" for entry in cluster.environment),
    ]


def _srun_options(launch: Launch) -> list[str]:
    cluster = launch.cluster
    options = [f"--mpi={cluster.mpi}"] if cluster.mpi else []
    if cluster.container is None:
        return options
    own = {launch.workdir, launch.root, launch.folder}  # all need not be below the first
    if cluster.env_file is not None:
        own.add(Path(cluster.env_file))
    outer = [path for path in sorted(own) if not own & set(path.parents)]
    mounts = [*cluster.mounts, *(f"{path}:{path}" for path in outer)]
    return [
        *options,
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={launch.workdir}",
    ]


def _doctor_options(launch: Launch) -> list[str]:
    """What the nodes are to be checked for besides what every job needs."""
    cluster = launch.cluster
    inside = [(mount.split(":") * 2)[1] for mount in cluster.mounts]
    return [
        f"--gpus={cluster.gpus_per_node}",
        *(f"--token={name}" for name in launch.tokens),
        *(f"--readable={path}" for path in (*launch.readable, *inside)),
    ]


def _list(name: str, values: Sequence[str]) -> list[str]:
    """An array of bash, one value per line."""
    if not values:
        return [f"{name}=()"]
    return [f"{name}=(", *(f"    {_quoted(value)}" for value in values), ")"]


def _quoted(value: str) -> str:
    """For bash; a comma means nothing to it, but shellcheck takes a bare one for a slip."""
    quoted = shlex.quote(value)
    return f"'{value}'" if quoted == value and "," in value else quoted


def _arguments(launch: Launch) -> list[str]:
    """The training configuration: what ``nemo-apo train`` is given."""
    if not launch.elements:
        folder = shlex.quote(str(launch.run_folders[0]))
        return [*_list("arguments", launch.arguments), f"run_folder={folder}"]
    root = launch.root / launch.name
    lines = _list("arguments", [*launch.arguments, f"run.root={root}"])
    lines.append("case $SLURM_ARRAY_TASK_ID in")
    for index, element in enumerate(launch.elements):
        name = shlex.quote(element.name)
        own = " ".join(map(shlex.quote, [*element.overrides, f"run.name={element.name}"]))
        lines.append(f"    {index}) run_name={name}; arguments+=({own}) ;;")
    return [*lines, "esac", f"run_folder={shlex.quote(str(root))}/$run_name"]
