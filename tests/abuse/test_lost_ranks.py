"""A rank that is killed or stopped: the job ends in time, names it, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from nemo_apo import record
from nemo_apo.trainer.checkpoint_search import checkpoint_folders
from nemo_apo.trainer.sealed_folder import content_faults, read_manifest, shape_faults
from tests.abuse.effort import IS_LONG, report

RANKS = 4
TIMEOUT_S = 6.0
# After the collective's timeout: finding out who is silent, and the launcher's own end.
GRACE_S = 10.0
MARK = "NEMO_APO_TEST_JOB"
OVERRIDES = [
    "parallel=tp2_pp2",
    f"parallel.timeout_minutes={TIMEOUT_S / 60}",
    "run.steps=50",
    "run.save_every=1",
    "run.keep_last=2",
    "run.report=false",
    "run.tensorboard=false",
    "run.console=plain",
    "warm_start.steps=0",
    "rollout.prompts=4",
    "update.micro_batch_size=8",
    "evaluation.every=100",
    "evaluation.prompts=8",
    "evaluation.pass_prompts=4",
]
CASES = [
    (rank, name, phase)
    for phase in ("rollout", "forward", "backward", "save")
    for name in ("SIGKILL", "SIGSTOP")
    for rank in range(RANKS)
]
# Both signals, every phase and every rank once.
SHORT = [
    (0, "SIGKILL", "save"),
    (1, "SIGSTOP", "rollout"),
    (2, "SIGSTOP", "backward"),
    (3, "SIGKILL", "forward"),
]


def processes_of(job: str) -> list[int]:
    """Processes that carry the job's mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={job}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def watched(process: subprocess.Popen) -> tuple[str, float]:
    """All output, and how many seconds the job lived on after the fault."""
    assert process.stdout is not None
    lines, fault = [], 0.0
    for line in process.stdout:
        lines.append(line)
        if line.startswith("faulty:"):
            fault = time.monotonic()
    process.wait(timeout=60)
    assert fault > 0.0, "".join(lines)
    return "".join(lines), time.monotonic() - fault


@pytest.mark.slow(reason="starts four ranks for every case")
@pytest.mark.parametrize(("rank", "name", "phase"), CASES if IS_LONG else SHORT)
def test_the_job_ends_in_time_and_names_the_rank(
    rank: int, name: str, phase: str, tmp_path: Path
) -> None:
    job = uuid.uuid4().hex
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={RANKS}", "-m", "tests.abuse.faulty_train"]
    arguments = [str(rank), name, phase, "train", f"run.root={tmp_path}", "run.name=run"]
    process = subprocess.Popen(
        [*launcher, *arguments, *OVERRIDES],
        env={**os.environ, MARK: job, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        told, seconds = watched(process)
    finally:
        for left in processes_of(job):
            os.kill(left, signal.SIGKILL)
    assert process.returncode != 0
    assert seconds <= TIMEOUT_S + GRACE_S, told
    assert f"nemo-apo: rank {rank} (" in told, told
    time.sleep(1.0)
    assert processes_of(job) == []
    folders = checkpoint_folders(tmp_path / "run" / record.CHECKPOINT_DIR)
    assert folders
    for folder in folders:
        manifest = read_manifest(folder)
        assert not shape_faults(folder, manifest.files)
        assert not content_faults(folder, manifest, manifest.files)
    report(f"{name} of rank {rank} in {phase}, ended after {seconds:.1f} s", 1)
