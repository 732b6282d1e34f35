"""Jobs of the tests: launched by the command, watched by scontrol."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_apo import record

REPOSITORY = Path(__file__).parent.parent.parent
WAIT_S = 600.0
CLUSTER = (
    "cluster=cpu",
    "cluster.nodes=2",
    "cluster.processes_per_node=1",
    "cluster.partition=batch",
    "cluster.time=00:10:00",
    "cluster.signal_before=60",
    "cluster.mpi=none",
    f"cluster.environment=['PYTHONPATH={REPOSITORY}','GLOO_SOCKET_IFNAME=lo','OMP_NUM_THREADS=1']",
    "cluster.doctor=false",
)
# A few small steps whose rewards differ.
TRAINING = (
    "experiment=smoke",
    "task.length=3",
    "task.reward=graded",
    "rollout.prompts=4",
    "warm_start.steps=20",
    "evaluation.every=100",
    "run.steps=24",
    "run.save_every=0",
    "run.report=false",
    "run.tensorboard=false",
    "run.console=plain",
)


def launch(
    folder: Path, *arguments: str, training: Sequence[str] = TRAINING
) -> subprocess.CompletedProcess[str]:
    """``nemo-apo launch slurm``, started in the folder."""
    return subprocess.run(
        [sys.executable, "-m", "nemo_apo", "launch", "slurm", *CLUSTER, *training, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def launched(folder: Path, *arguments: str) -> str:
    """The id of the job that the command submits."""
    done = launch(folder, *arguments)
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\d+)", done.stdout)
    assert found, done.stdout
    return found[1]


def fields(job: str) -> dict[str, str]:
    """What scontrol shows of a job."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def wait_until(holds: Callable[[], bool], what: str, folder: Path, seconds: float = WAIT_S) -> None:
    """Wait; on the limit, fail with all logs below the folder."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come\n{logs(folder)}")
        time.sleep(0.1)


def wait_for(job: str, folder: Path, *states: str) -> dict[str, str]:
    """The job's fields once it is in one of the states."""
    wait_until(lambda: fields(job).get("JobState") in states, f"{job} {states}", folder)
    return fields(job)


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until a run has written the metrics of a step."""
    path = folder / record.METRICS_FILE

    def there() -> bool:
        return path.exists() and len(path.read_text().splitlines()) > step

    wait_until(there, f"step {step}", folder)


def logs(folder: Path) -> str:
    """All that the jobs below a folder have written."""
    paths = sorted(folder.rglob("*.log"))
    return "\n".join(f"{path}:\n{path.read_text(errors='replace')}" for path in paths)


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics without what the clock measured."""
    lines = [json.loads(line) for line in (folder / record.METRICS_FILE).read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith("time/") and key != record.TOKENS_PER_SECOND
        }
        for line in lines
    ]
