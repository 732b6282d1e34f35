"""Runs that are stopped early, by signals, by the clock and at every check, and gone on with."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_apo import record
from nemo_apo.config import AnchorConfig, Config, ParallelConfig, UpdateConfig
from nemo_apo.trainer import loop
from nemo_apo.trainer.checkpoint import ROLLOUT_FILE
from nemo_apo.trainer.interruption import EXIT_STOPPED_EARLY, Interruption, StoppedEarly
from nemo_apo.trainer.run_folder import TrainingStopped
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks

from .resumed_runs import checkpoint_at_the_end, metrics, prepared, ranks_of, train
from .tiny_runs import bits_equal, tiny_config

STEPS = 4
# Four optimizer steps per rollout.
BASE = tiny_config(update=UpdateConfig(mini_batches=2, epochs=2, micro_batch_size=4))


def run_until_asked(config: Config, asked: int) -> bool:
    """Run with a stop at the given time of asking; whether the run was stopped."""
    count = 0

    def requested(self: Interruption) -> str | None:
        nonlocal count
        count += 1
        return "the test" if count == asked else None

    Interruption.requested = requested  # type: ignore[method-assign]
    try:
        loop.run(config)
    except StoppedEarly:
        return True
    return False


def stored_rollouts(config: Config) -> int:
    """How many checkpoints hold a rollout."""
    folder = Path(config.run.root) / config.run.name / record.CHECKPOINT_DIR
    return len(list(folder.glob(f"step_*/{ROLLOUT_FILE}")))


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        pytest.param(BASE, 19, id="one rank, in the warm start and at the 19th check"),
        pytest.param(BASE, 6, id="one rank, at every 6th check"),
        pytest.param(
            replace(BASE, anchor=AnchorConfig("ema", decay=0.6)), 5, id="moving anchor, every 5th"
        ),
        pytest.param(replace(BASE, parallel=ParallelConfig(2)), 7, id="TP2, at every 7th check"),
    ],
)
def test_a_run_stopped_again_and_again_is_the_uninterrupted_run(
    config: Config, asked: int, tmp_path: Path
) -> None:
    whole = prepared(config, tmp_path, "whole", steps=STEPS, save_every=STEPS)
    train(whole)
    parts = prepared(config, tmp_path, "parts", steps=STEPS, save_every=STEPS)
    parts = replace(parts, run=replace(parts.run, if_exists="resume"))
    ranks, stops = ranks_of(config), 0
    # The first stop falls into the ten steps of the warm start, of which nothing is kept.
    assert run_ranks(ranks, run_until_asked, parts, 4) == [True] * ranks
    assert not list((tmp_path / "parts" / record.CHECKPOINT_DIR).glob("step_*"))
    # The next right after it: its weights and the first evaluation are kept.
    assert run_ranks(ranks, run_until_asked, parts, 11) == [True] * ranks
    while run_ranks(ranks, run_until_asked, parts, asked) == [True] * ranks:
        stops += 1
        assert stops < 20
    assert stops >= 1
    assert stored_rollouts(parts) >= 1
    assert metrics(tmp_path, "parts") == metrics(tmp_path, "whole")
    for (tensors, state), (wanted, wanted_state) in zip(
        checkpoint_at_the_end(parts), checkpoint_at_the_end(whole), strict=True
    ):
        assert bits_equal(tensors, wanted)
        for clock in ("wall_s", "warm_start_s"):
            state.pop(clock), wanted_state.pop(clock)
        assert state == wanted_state


def test_a_stop_with_nothing_new_saves_nothing(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=STEPS, if_exists="resume")
    assert run_ranks(1, run_until_asked, config, 17) == [True]
    folder = tmp_path / "run" / record.CHECKPOINT_DIR
    before = sorted(path.name for path in folder.iterdir())
    assert stored_rollouts(config) == 1
    assert run_ranks(1, run_until_asked, config, 1) == [True]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_another_cut_into_optimizer_steps_is_refused_within_a_rollout(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=STEPS, if_exists="resume")
    assert run_ranks(1, run_until_asked, config, 17) == [True]
    other = replace(config, update=replace(config.update, mini_batches=4, epochs=1))
    with pytest.raises(Exception, match=r"between the optimizer steps of a rollout(.|\n)*epochs"):
        train(other)


def test_nothing_may_change_within_a_rollout(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=STEPS, if_exists="resume")
    assert run_ranks(1, run_until_asked, config, 17) == [True]
    allowed = replace(config.run, allow_changed=("optimizer",))
    other = replace(config, run=allowed, optimizer=replace(config.optimizer, lr=1.0))
    with pytest.raises(RankFailure, match=r"optimizer\.lr was 0\.001 and is now 1\.0"):
        train(other)


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    train(prepared(BASE, tmp_path, "run", steps=STEPS, save_every=STEPS))
    fewer = prepared(BASE, tmp_path, "run", steps=STEPS - 1, if_exists="resume")
    with pytest.raises(RankFailure, match=r"run\.steps=3: must be at least the checkpoint's 4"):
        train(fewer)


def test_a_metrics_line_that_cannot_be_written_stops_all_ranks(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=STEPS)

    def work() -> str:
        evaluate = loop.evaluate

        def then_blocked(*args: object) -> object:
            (tmp_path / "run" / record.METRICS_FILE).mkdir(exist_ok=True)
            return evaluate(*args)  # type: ignore[arg-type]

        loop.evaluate = then_blocked  # type: ignore[assignment]
        with pytest.raises(TrainingStopped) as stopped:
            loop.run(config)
        return str(stopped.value)

    for told in run_ranks(2, work):
        assert told.startswith("rank 0: IsADirectoryError: [Errno 21] Is a directory")


def test_the_best_checkpoint_survives_a_stop_in_the_rollout_after_it(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=STEPS, save_every=2, if_exists="resume")
    config = replace(config, run=replace(config.run, keep_last=1, keep_best=1))
    # Ten checks of the warm start, seven of each of two steps, the last within the third rollout.
    assert run_ranks(1, run_until_asked, config, 10 + 2 * 7 + 5) == [True]
    folder = tmp_path / "run" / record.CHECKPOINT_DIR
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000002.1"]


OVERRIDES = [
    "run.steps=10",
    "run.save_every=0",
    "run.report=false",
    "run.tensorboard=false",
    "run.console=plain",
    "warm_start.steps=2",
    "rollout.prompts=8",
    "update.micro_batch_size=32",
    "evaluation.every=100",
    "evaluation.prompts=8",
    "evaluation.pass_prompts=4",
]


def command(root: Path, name: str, *more: str) -> subprocess.Popen:
    arguments = ["train", f"run.root={root}", f"run.name={name}", *OVERRIDES, *more]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "nemo_apo", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_after(process: subprocess.Popen, step: int, number: signal.Signals | None) -> str:
    """All output; the signal is sent when the given RL step is done."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if number is not None and f"step {step}/" in line.replace("  ", " "):
            process.send_signal(number)
            number = None
    process.wait(timeout=60)
    return "".join(lines)


@pytest.mark.slow(reason="starts the command four times")
def test_the_command_saves_on_signals_and_goes_on(tmp_path: Path) -> None:
    whole = command(tmp_path, "whole")
    output_after(whole, 0, None)
    assert whole.returncode == 0
    for step, number in ((3, signal.SIGUSR1), (7, signal.SIGTERM)):
        part = command(tmp_path, "parts", "run.if_exists=resume")
        told = output_after(part, step, number)
        assert part.returncode == EXIT_STOPPED_EARLY, told
        assert f"stopped early: signal {number.name.removeprefix('SIG')}" in told
        done = metrics(tmp_path, "parts")[-1][record.STEP]
        assert step <= done < 10
    last = command(tmp_path, "parts", "run.if_exists=resume")
    told = output_after(last, 0, None)
    assert last.returncode == 0, told
    assert metrics(tmp_path, "parts") == metrics(tmp_path, "whole")
    assert json.loads((tmp_path / "parts" / record.SUMMARY_FILE).read_text())["steps"] == 10


def test_the_time_limit_stops_a_run(tmp_path: Path) -> None:
    config = prepared(BASE, tmp_path, "run", steps=10**6, save_every=0, max_time="00:00:02")

    def until_stopped() -> str:
        with pytest.raises(StoppedEarly) as stopped:
            loop.run(config)
        return str(stopped.value)

    assert run_ranks(1, until_stopped) == ["run.max_time is reached"]
    assert len(list((tmp_path / "run" / record.CHECKPOINT_DIR).glob("step_*"))) == 1
