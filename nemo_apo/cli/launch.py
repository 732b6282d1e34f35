"""``nemo-apo launch slurm``: check, render a job script, submit it, and follow it if asked to."""

import argparse
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path

from nemo_apo import __version__, record
from nemo_apo.cli.overrides import add_config_arguments
from nemo_apo.cli.train import require_grader
from nemo_apo.compose import compose
from nemo_apo.compose.hf_model import check_checkpoint
from nemo_apo.config import Config, ConfigError
from nemo_apo.config_rules import check_task_data, validate
from nemo_apo.launch import slurm
from nemo_apo.launch.cluster import SECRET_NAME, Cluster, read_cluster
from nemo_apo.launch.script import Launch, image_digest, render, render_report
from nemo_apo.launch.sweep import read_sweep
from nemo_apo.planning.memory import gigabytes
from nemo_apo.planning.run_memory import run_memory
from nemo_apo.planning.settings import GPU_MEMORY

JOB_SCRIPT = "job.sbatch"
REPORT_SCRIPT = "report.sbatch"
RECORD_FILE = "launch.json"
# Shorter values of secrets would be found by chance.
_SECRET_LENGTH = 8
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("scheduler", choices=["slurm"], help="where to")
    add_config_arguments(parser, before="cluster=NAME, cluster=FILE.yaml, cluster.KEY=VALUE; ")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="a job array over every combination of overrides with several values "
        "(objective=apo,gspo run.seed=0,1,2), and a report over its runs",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="show the jobs' states until they end, and end with their status",
    )


def main(arguments: argparse.Namespace) -> None:
    """Launch.

    Raises:
        ConfigError: for a cluster or a training configuration that cannot run, or a job that Slurm
            refuses; nothing is submitted then.
        SystemExit: with the job's status, where it was followed and that is not 0.
    """
    written = arguments.overrides
    cluster, overrides = read_cluster(written)
    arguments.overrides = overrides
    launch = _launch(cluster, arguments, Path.cwd())
    script = render(launch)
    _refuse_secrets(script)
    if arguments.dry_run:
        print(script, end="")
        return
    slurm.require_slurm()
    jobs = _submitted(launch, script, written)
    print(f"job {', '.join(jobs)}: logs and state in {launch.folder}", flush=True)
    if arguments.follow:
        status = slurm.follow(jobs, lambda text: print(text, flush=True))
        raise SystemExit(status)


def _launch(cluster: Cluster, arguments: argparse.Namespace, here: Path) -> Launch:
    """What is to be submitted, every run's configuration checked."""
    fixed, elements = arguments.overrides, []
    if arguments.sweep:
        fixed, elements = read_sweep(fixed)
    files = (arguments.config, arguments.config_dir)
    chosen = [element.overrides for element in elements] or [()]
    configs = [compose([*fixed, *overrides], *files) for overrides in chosen]
    for config in configs:
        _check(config, cluster)
    run = configs[0].run
    workdir = Path(cluster.workdir or here).absolute()
    root = workdir / run.root
    logs = workdir / cluster.logs if cluster.logs else root / run.name / "slurm"
    launch = Launch(
        cluster=cluster,
        name=run.name,
        arguments=(*_file_arguments(arguments), *fixed),
        tokens=("WANDB_API_KEY",) if run.wandb else (),
        readable=tuple(sorted({path for config in configs if (path := config.model.path)})),
        elements=tuple(elements),
        root=root,
        folder=logs / datetime.now().strftime("%Y%m%d-%H%M%S"),
        workdir=workdir,
        python=cluster.python or ("python" if cluster.container else sys.executable),
    )
    for path in (launch.workdir, launch.folder):
        _check_path(path)
    for folder in launch.run_folders:
        _check_folder(folder, run.if_exists)
    return launch


def _file_arguments(arguments: argparse.Namespace) -> list[str]:
    named = {"--config": arguments.config, "--config-dir": arguments.config_dir}
    return [f"{option}={path.absolute()}" for option, path in named.items() if path is not None]


def _check(config: Config, cluster: Cluster) -> None:
    """What ``nemo-apo train`` would check on the ranks of the job, as far as it is known here."""
    try:
        # What a container holds cannot be seen from here.
        validate(config, cluster.ranks, reads_files=cluster.container is None)
    except ConfigError as error:
        per_node = f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks"
        raise ConfigError(f"{error} (on {per_node} of the cluster)") from None
    if config.run.dry_run:
        raise ConfigError("run.dry_run=true: a job would train nothing; --dry-run shows its script")
    if cluster.gpus_per_node == 0 and config.parallel.backend == "nccl":
        raise ConfigError("parallel.backend=nccl: needs GPUs, and cluster.gpus_per_node=0")
    if cluster.gpu is not None:
        memory = run_memory(config, cluster.ranks)
        if memory.total > GPU_MEMORY[cluster.gpu]:
            raise ConfigError(
                f"cluster.gpu={cluster.gpu}: a rank needs {memory} and the GPU has "
                f"{gigabytes(GPU_MEMORY[cluster.gpu])} (nemo-apo plan)"
            )
    if cluster.container is None:
        require_grader(config)
        check_checkpoint(config)
        check_task_data(config)


def _check_path(path: Path) -> None:
    """Refuse a path that Slurm, srun or an override would read as something else."""
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise ConfigError(
            f"{path}: a job's folders may hold letters, digits and _ . / + - only; start the "
            "command elsewhere (or cluster.workdir), or choose another run.root and run.name"
        )


def _check_folder(folder: Path, if_exists: str) -> None:
    """Refuse before the job waits in the queue what the trainer would refuse at its start."""
    if if_exists == "error" and any(
        (folder / name).exists() for name in (record.CONFIG_FILE, record.METRICS_FILE)
    ):
        raise ConfigError(
            f"run.name={folder.name}: {folder} already holds a run; choose another run.name, or "
            "run.if_exists=overwrite or run.if_exists=resume"
        )


def _refuse_secrets(script: str) -> None:
    """Raise ``ConfigError`` if the script holds the value of a secret of the environment."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= _SECRET_LENGTH and value in script:
            raise ConfigError(
                f"the job script would hold the value of {name}; write {name}=... into a file that "
                "only you can read, and name it by cluster.env_file"
            )


def _submitted(launch: Launch, script: str, overrides: list[str]) -> list[str]:
    """Write the script, have Slurm check it, submit it; ids of the jobs."""
    path = launch.folder / JOB_SCRIPT
    try:
        launch.folder.mkdir(parents=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{launch.folder}: cannot be written: {error}") from None
    try:
        slurm.check_script(path)
    except slurm.SlurmError as error:
        path.unlink()
        launch.folder.rmdir()
        raise ConfigError(f"Slurm would not take the job: {error}") from None
    jobs: list[str] = []
    try:
        for _ in range(launch.cluster.chain):
            jobs.append(slurm.submit(path))
        if launch.elements:
            report = launch.folder / REPORT_SCRIPT
            report.write_text(render_report(launch, jobs), encoding="utf-8")
            jobs.append(slurm.submit(report))
    except slurm.SlurmError:
        slurm.cancel(jobs)
        raise
    _write_record(launch, jobs, overrides)
    return jobs


def _write_record(launch: Launch, jobs: list[str], overrides: list[str]) -> None:
    image = launch.cluster.container
    written = {
        "jobs": jobs,
        "overrides": overrides,
        "nemo_apo": __version__,
        "nodes": launch.cluster.nodes,
        "ranks": launch.cluster.ranks,
        "image": image,
        "image_digest": image_digest(image),
        "runs": [str(folder) for folder in launch.run_folders],
    }
    text = json.dumps(written, indent=2) + "\n"
    (launch.folder / RECORD_FILE).write_text(text, encoding="utf-8")
