"""A run as a whole: where it may write, when it gives up, what it leaves behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config, WarmStartConfig
from nemo_apo.trainer import loop
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.rl_step import RLStep
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks

from .tiny_runs import EqualRewardTask, tiny_config


def small_run(root: Path, **changes: Any) -> Config:
    config = tiny_config(warm_start=WarmStartConfig(steps=2, batch_size=8))
    changes = {"root": str(root), "name": "run", "steps": 2, **changes}
    return replace(config, run=replace(config.run, **changes))


def train(config: Config) -> None:
    run_ranks(1, loop.run, config)


def test_a_folder_with_a_run_is_refused_or_emptied_as_told(tmp_path: Path) -> None:
    train(small_run(tmp_path))
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        record.CONFIG_FILE,
        record.METRICS_FILE,
        record.SAMPLES_FILE,
        record.SUMMARY_FILE,
    }
    first = (folder / record.METRICS_FILE).read_text()
    with pytest.raises(RankFailure, match=r"ConfigError: run\.name=run: .* already holds a run"):
        train(small_run(tmp_path))
    assert (folder / record.METRICS_FILE).read_text() == first

    # What is not the run's own stays where it is.
    (folder / "notes.txt").write_text("mine")
    train(small_run(tmp_path, if_exists="overwrite", steps=1))
    lines = (folder / record.METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)[record.STEP] for line in lines] == [0, 1]
    assert (folder / "notes.txt").read_text() == "mine"


def test_figures_of_the_run_are_written_by_their_names(tmp_path: Path) -> None:
    train(small_run(tmp_path))
    text = (tmp_path / "run" / record.METRICS_FILE).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    known = {*record.METRICS, record.STEP, record.FINDINGS}
    for line in lines:
        assert set(line) <= known
    assert record.EVAL_ACCURACY in lines[0]
    assert record.EVAL_ACCURACY not in lines[1]
    assert record.EVAL_ACCURACY in lines[2]
    assert [line[record.SAMPLES] for line in lines[1:]] == [16, 32]
    summary = json.loads((tmp_path / "run" / record.SUMMARY_FILE).read_text())
    assert set(record.Summary.__dataclass_fields__) == set(summary)
    assert (summary["steps"], summary["samples"], summary["optimizer_steps"]) == (2, 32, 4)
    assert summary["reward_final"] == lines[2][record.EVAL_REWARD]
    assert summary["alpha_last"] == lines[2][record.ALPHA]
    assert summary["pass_at_8"] is None
    assert summary["pass_k"] == 2


def test_training_stops_when_nothing_is_finite_any_more(tmp_path: Path) -> None:
    config = small_run(tmp_path, steps=50)
    config = replace(config, update=replace(config.update, max_skipped_steps=3))

    def diverged() -> None:
        healthy = RLStep._loss

        def loss(self: RLStep, logits: Tensor, batch: MicroBatch) -> tuple[Tensor, dict]:
            return healthy(self, logits * float("nan"), batch)

        RLStep._loss = loss  # type: ignore[method-assign]
        loop.run(config)

    told = r"TrainingStopped: 4 optimizer steps in a row were skipped(.|\n)*RL step 2"
    with pytest.raises(RankFailure, match=told):
        run_ranks(1, diverged)
    lines = (tmp_path / "run" / record.METRICS_FILE).read_text().splitlines()
    assert [json.loads(line).get(record.SKIPPED_STEPS) for line in lines] == [None, 2, 2]
    assert json.loads(lines[-1])[record.GRAD_NORM] is None


def test_a_grader_that_always_fails_does_not_end_the_run(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    config = replace(
        config,
        task=EqualRewardTask(worth=float("nan")),
        groups=replace(config.groups, failed_grade="drop"),
    )
    train(config)
    summary = json.loads((tmp_path / "run" / record.SUMMARY_FILE).read_text())
    assert (summary["steps"], summary["optimizer_steps"]) == (2, 0)


def test_resuming_a_run_without_checkpoint_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    train(small_run(tmp_path))
    before = (tmp_path / "run" / record.METRICS_FILE).read_text()
    with pytest.raises(RankFailure, match=r"run\.if_exists=resume: .* holds a run but no check"):
        train(small_run(tmp_path, if_exists="resume"))
    assert (tmp_path / "run" / record.METRICS_FILE).read_text() == before


def test_a_refused_resume_leaves_the_configuration_of_the_run(tmp_path: Path) -> None:
    train(small_run(tmp_path, stop_after=1))
    before = (tmp_path / "run" / record.CONFIG_FILE).read_text()
    other = small_run(tmp_path, if_exists="resume", seed=5)
    with pytest.raises(RankFailure, match=r"run\.seed was 0 and is now 5"):
        train(other)
    assert (tmp_path / "run" / record.CONFIG_FILE).read_text() == before


def test_weights_to_start_from_are_looked_at_before_a_run_is_overwritten(tmp_path: Path) -> None:
    train(small_run(tmp_path, save_every=1))
    before = (tmp_path / "run" / record.METRICS_FILE).read_text()
    config = small_run(tmp_path, if_exists="overwrite")
    inside = str(tmp_path / "run" / record.CHECKPOINT_DIR / "step_000002")
    for load, rule in ((inside, "would remove"), ("no/such/folder", "no such folder")):
        warm_start = replace(config.warm_start, load=load)
        with pytest.raises(RankFailure, match=rf"warm_start\.load=.*{rule}"):
            train(replace(config, warm_start=warm_start))
    assert (tmp_path / "run" / record.METRICS_FILE).read_text() == before

    elsewhere = small_run(tmp_path, name="second")
    train(replace(elsewhere, warm_start=replace(elsewhere.warm_start, load=inside)))
    ends = json.loads((tmp_path / "run" / record.SUMMARY_FILE).read_text())
    starts = json.loads((tmp_path / "second" / record.SUMMARY_FILE).read_text())
    assert starts["reward_start"] == ends["reward_final"]
