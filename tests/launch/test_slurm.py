"""Slurm's answers, read; its commands are small programs here, the real ones in tests/slurm."""

import os
from pathlib import Path

import pytest

from nemo_apo.launch import slurm

RUNNING = (
    "JobId=12 JobName=nemo_apo-x UserId=root(0) JobState=RUNNING Reason=None Requeue=1 Restarts=2 "
    "BatchFlag=1 ExitCode=0:0 RunTime=00:01:00 Command=/x y/job.sbatch\n"
)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH but for the system's own."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if not _has_slurm() else str(tmp_path))
    return tmp_path


def _has_slurm() -> bool:
    return any(Path(folder, "scontrol").exists() for folder in ("/bin", "/usr/bin"))


def command(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def says(folder: Path, name: str, text: str) -> None:
    command(folder, name, f"echo '{text}'")


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("RUNNING", "0:0", None),
        ("PENDING", "75:0", None),
        ("COMPLETING", "1:0", None),
        ("PREEMPTED", "0:0", None),
        ("COMPLETED", "0:0", 0),
        ("FAILED", "76:0", 76),
        ("FAILED", "0:9", 137),
        ("CANCELLED", "0:0", 1),
        ("TIMEOUT", "0:0", 1),
        ("NODE_FAIL", "1:0", 1),
    ],
)
def test_a_status(commands: Path, state: str, code: str, status: int | None) -> None:
    text = RUNNING.replace("RUNNING", state).replace("ExitCode=0:0", f"ExitCode={code}")
    says(commands, "scontrol", text)
    (found,) = slurm.states("12")
    assert (found.job, found.state, found.restarts, found.status) == ("12", state, 2, status)


def test_elements_of_an_array(commands: Path) -> None:
    one = RUNNING.replace("JobId=12", "JobId=13 ArrayJobId=12 ArrayTaskId=0")
    waiting = one.replace("ArrayTaskId=0", "ArrayTaskId=1-5").replace("RUNNING", "PENDING")
    says(commands, "scontrol", one + waiting.replace("Reason=None", "Reason=Resources"))
    assert [str(state) for state in slurm.states("12")] == [
        "job 12_0 RUNNING, restarted 2 times",
        "job 12_1-5 PENDING (Resources), restarted 2 times",
    ]


def test_a_job_that_only_the_accounting_knows(commands: Path) -> None:
    command(
        commands, "scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    )
    says(commands, "sacct", "12|CANCELLED by 1000|0:15|1")
    (found,) = slurm.states("12")
    assert (found.state, found.restarts, found.status) == ("CANCELLED", 1, 143)


def test_a_job_that_nobody_knows(commands: Path) -> None:
    command(commands, "scontrol", "echo Invalid job id specified >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="scontrol: Invalid job id specified"):
        slurm.states("12")


def test_following_tells_changes_and_returns_the_highest_status(commands: Path) -> None:
    states = iter([("PENDING", "0:0"), ("RUNNING", "0:0"), ("RUNNING", "0:0"), ("FAILED", "3:0")])

    def sleep(_: float) -> None:
        state, code = next(states)
        text = RUNNING.replace("RUNNING", state).replace("ExitCode=0:0", f"ExitCode={code}")
        says(commands, "scontrol", text.replace("Restarts=2", "Restarts=0"))

    sleep(0.0)
    told: list[str] = []
    assert slurm.follow(["12"], told.append, sleep=sleep) == 3
    assert told == ["job 12 PENDING", "job 12 RUNNING", "job 12 FAILED, status 3"]


def test_following_outlives_a_controller_that_is_away_again_and_again(commands: Path) -> None:
    command(commands, "scontrol", "exit 1")
    asked = 0

    def sleep(_: float) -> None:
        nonlocal asked
        asked += 1
        if asked == 11:
            says(commands, "scontrol", RUNNING)
        elif asked == 12:
            command(commands, "scontrol", "exit 1")
        elif asked == 23:
            says(commands, "scontrol", RUNNING.replace("RUNNING", "COMPLETED"))

    assert slurm.follow(["12"], print, sleep=sleep) == 0
    command(commands, "scontrol", "exit 1")
    with pytest.raises(slurm.SlurmError):
        slurm.follow(["12"], print, sleep=lambda _: None)


def test_submission(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "another")
    command(commands, "sbatch", 'echo "$1 $2 $SBATCH_PARTITION" >"${0%/*}/told"; echo "15;cluster"')
    assert slurm.submit(Path("x.sbatch")) == "15"
    assert (commands / "told").read_text() == "--parsable x.sbatch \n"


def test_a_refusal_is_slurms_own_words(commands: Path) -> None:
    command(commands, "sbatch", "echo 'allocation failure: Invalid partition' >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="sbatch: allocation failure: Invalid partition"):
        slurm.check_script(Path("x.sbatch"))


def test_no_slurm(commands: Path) -> None:
    os.environ["PATH"] = str(commands)
    with pytest.raises(slurm.SlurmError, match="sbatch was not found"):
        slurm.require_slurm()
