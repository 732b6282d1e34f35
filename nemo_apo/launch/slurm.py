"""Slurm by its commands: ask whether a job would be taken, submit it, follow it to its end."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_apo.config import ConfigError

POLL_S = 5.0
# How often in a row Slurm may fail to answer before following ends.
_SILENT_POLLS = 12
_COMMAND_S = 60
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "REVOKED",
}


class SlurmError(ConfigError):
    """Slurm refused, or does not answer; the message is its own."""


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array.

    Attributes:
        job: its id, "12" or "12_3".
        state: in Slurm's words.
        restarts: how often it was requeued.
        reason: why it waits, "" if it does not.
        status: exit status, 128 + signal for one that a signal ended; None before its end.
    """

    job: str
    state: str
    restarts: int
    reason: str
    status: int | None

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.status is not None

    def __str__(self) -> str:
        restarts = f", restarted {self.restarts} times" if self.restarts else ""
        reason = f" ({self.reason})" if self.reason else ""
        status = f", status {self.status}" if self.has_ended else ""
        return f"job {self.job} {self.state}{reason}{restarts}{status}"


def require_slurm() -> None:
    """Raise ``SlurmError`` where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch was not found: run this on a login node; --dry-run needs no Slurm")


def check_script(script: Path) -> str:
    """What ``sbatch --test-only`` says of a script that would be taken.

    Raises:
        SlurmError: if it would not.
    """
    return _sbatch("--test-only", str(script))


def submit(script: Path) -> str:
    """Submit a script and return the job's id."""
    return _sbatch("--parsable", str(script)).split(";")[0].strip()


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs, if there are any."""
    if jobs:
        _run("scancel", *jobs)


def states(job: str) -> list[JobState]:
    """The state of a job, or of every element of an array, by ``scontrol`` or else ``sacct``.

    Raises:
        SlurmError: if neither knows the job.
    """
    try:
        return list(_from_scontrol(_run("scontrol", "show", "job", "--oneliner", job)))
    except SlurmError as error:
        found = list(_from_sacct(job))
        if not found:
            raise error from None
        return found


def follow(
    jobs: Sequence[str],
    tell: Callable[[str], None],
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Tell every change of the jobs' states until all have ended; the highest exit status.

    Raises:
        SlurmError: if Slurm does not answer for minutes.
    """
    told: dict[str, str] = {}
    silent = 0
    while True:
        try:
            found = [state for job in jobs for state in states(job)]
            silent = 0
        except SlurmError:
            silent += 1
            if silent >= _SILENT_POLLS:
                raise
            sleep(poll_s)
            continue
        for state in found:
            if told.get(state.job) != str(state):
                tell(str(state))
                told[state.job] = str(state)
        if all(state.has_ended for state in found):
            return max(state.status or 0 for state in found)
        sleep(poll_s)


def _from_scontrol(text: str) -> Iterator[JobState]:
    for line in filter(None, text.splitlines()):
        fields = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", line))
        job = fields["JobId"]
        if "ArrayTaskId" in fields:
            job = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
        state, reason = fields["JobState"], fields.get("Reason", "None")
        yield JobState(
            job=job,
            state=state,
            restarts=int(fields.get("Restarts", "0")),
            reason="" if reason == "None" or state != "PENDING" else reason,
            status=_status(state, fields.get("ExitCode", "0:0")),
        )


def _from_sacct(job: str) -> Iterator[JobState]:
    """The same from the accounting, for a job that the controller has forgotten."""
    if shutil.which("sacct") is None:
        return
    columns = "--format=JobID,State,ExitCode,Restarts"
    try:
        text = _run("sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={job}")
    except SlurmError:
        return
    for line in text.splitlines():
        name, state, code, restarts = line.split("|")
        state = state.split()[0]  # "CANCELLED by 1000"
        yield JobState(name, state, int(restarts or 0), "", _status(state, code))


def _status(state: str, code: str) -> int | None:
    """The exit status of a job in a state, from Slurm's "status:signal"."""
    if state not in ENDED:
        return None
    status, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return 128 + int(signal)
    # A job that did not end by itself may have the status of success.
    return int(status) or (0 if state == "COMPLETED" else 1)


def _sbatch(option: str, script: str) -> str:
    # What is set for a job around this command is no setting of the new one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SBATCH_")}
    return _run("sbatch", option, script, environment=environment)


def _run(*command: str, environment: dict[str, str] | None = None) -> str:
    """All that a command prints."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} was not found") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer for {_COMMAND_S} s") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{command[0]}: {said or f'ended with {done.returncode}'}")
    return done.stdout + done.stderr if command[0] == "sbatch" else done.stdout
