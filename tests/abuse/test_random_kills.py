"""Real ``nemo-apo train`` processes, killed at random and resumed: every prompt is trained once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nemo_apo import record
from tests.trainer.resumed_runs import metrics

from .effort import report, tries

KILLS = tries(3, 10)
STEPS = 4 * KILLS + 2
ROOT = Path(__file__).parents[2]
_TIMEOUT_S, _POLL_S = 120.0, 0.01
SETTINGS = (
    f"run.steps={STEPS}",
    "run.save_every=2",
    "run.console=off",
    "run.tensorboard=false",
    "run.report=false",
    "rollout.prompts=8",
    "rollout.group_size=4",
    "warm_start.steps=20",
    "evaluation.every=4",
    "evaluation.prompts=16",
    "evaluation.pass_prompts=8",
    "tau=adaptive",
    "anchor=ema",
    "schedule=ess",
)


class Process:
    """A training process and the log of its rollouts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        self.log.touch()
        self.before = self.lines()
        settings = (*SETTINGS, f"run.root={folder}", f"run.name={name}", "run.if_exists=resume")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.abuse.logged_train", str(self.log)]
        self.process = subprocess.Popen(
            [*command, "train", *settings],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self) -> int:
        return self.log.read_bytes().count(b"\n")

    def wait(self) -> None:
        """Wait for the end of the training."""
        _, errors = self.process.communicate(timeout=_TIMEOUT_S)
        assert self.process.returncode == 0, errors

    def kill_after(self, rollouts: int, delay_s: float) -> None:
        """Kill the process some time after it has drawn some rollouts."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.lines() < self.before + rollouts:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(_POLL_S)
        time.sleep(delay_s)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=_TIMEOUT_S)
        assert self.process.returncode == -signal.SIGKILL


def trained(log: Path) -> tuple[list[dict[str, Any]], int]:
    """The rollouts that led to the final weights, and how many were drawn and lost.

    A resumed process goes on from the step of its checkpoint: what was drawn at that step or later
    before it died has left no trace in the weights.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
        kept.append(line)
    return kept, len(lines) - len(kept)


@pytest.mark.slow(reason="starts several training processes")
def test_every_prompt_is_trained_once_over_random_kills(tmp_path: Path) -> None:
    random = Random("kills")
    Process(tmp_path, "whole").wait()
    # The first checkpoint is at step 2, and what is killed before it cannot be resumed.
    for kill in range(KILLS):
        rollouts = random.randint(3 if kill == 0 else 1, 4)
        Process(tmp_path, "killed").kill_after(rollouts, random.uniform(0.0, 0.4))
    Process(tmp_path, "killed").wait()
    wanted, none_lost = trained(tmp_path / "whole.log")
    got, lost = trained(tmp_path / "killed.log")
    assert [line["step"] for line in got] == list(range(STEPS))
    assert got == wanted
    assert none_lost == 0
    assert lost > 0, "no kill cost a step, so nothing was shown"
    assert metrics(tmp_path, "killed") == metrics(tmp_path, "whole")
    assert (tmp_path / "killed" / record.SUMMARY_FILE).exists()
    report(f"random kills of a training of {STEPS} steps ({lost} rollouts drawn again)", KILLS)
