"""A stopped and resumed run goes on exactly as the run that was never stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import (
    AnchorConfig,
    Config,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    WarmStartConfig,
)
from nemo_apo.core.alpha_schedule import EssSchedule, GuardedSchedule
from nemo_apo.core.objectives import AdpoSoftmax, Apo
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint import CheckpointError
from nemo_apo.trainer.loop import run
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, begin, bits_equal, parallel, tiny_config

STEPS, STOP = 6, 3
# Gates that open within six steps, so that alpha's memory matters.
LIVELY = GuardedSchedule(confidence="token", rho=0.5, rho_r=0.5)
VARIANTS = {
    "guarded alpha, old anchor": tiny_config(schedule=LIVELY),
    "moving average as anchor": tiny_config(anchor=AnchorConfig(name="ema", decay=0.6)),
    "lagged anchor, ess alpha": tiny_config(
        # Refreshed at step 2, so that the anchor at the stop is neither start nor policy.
        anchor=AnchorConfig(name="lagged", refresh_every=2),
        schedule=EssSchedule(),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=9, weight_decay=0.1),
    ),
    "two tensor-parallel ranks": tiny_config(parallel=parallel(2, 1)),
    "two context-parallel ranks": tiny_config(parallel=ParallelConfig(context_parallel_size=2)),
    "virtual pipeline, moving average": tiny_config(
        model=replace(TINY_MODEL, num_layers=4),
        parallel=ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
        anchor=AnchorConfig(name="ema", decay=0.6),
    ),
    "bfloat16": tiny_config(model=replace(TINY_MODEL, params_dtype="bfloat16")),
}


def prepared(config: Config, root: Path, name: str, **changes: Any) -> Config:
    run_config = RunConfig(
        name=name,
        root=str(root),
        steps=STEPS,
        save_every=STEPS,
        console="off",
        tensorboard=False,
        report=False,
    )
    return replace(
        config,
        run=replace(run_config, **changes),
        warm_start=WarmStartConfig(steps=10, batch_size=8),
        evaluation=EvaluationConfig(every=2, prompts=8, pass_prompts=4, pass_k=2),
    )


def ranks_of(config: Config) -> int:
    layout = config.parallel
    model_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return model_ranks * layout.context_parallel_size


def train(config: Config) -> None:
    run_ranks(ranks_of(config), run, config)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock measured."""
    text = (root / name / record.METRICS_FILE).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith("time/") and key != record.TOKENS_PER_SECOND
        }
        for line in lines
    ]


def checkpoint_at_the_end(config: Config) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights, optimizer moments and remembered weights of rank 0, and the trainer's state."""

    def load() -> tuple[list[Tensor], dict[str, Any]]:
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
        training = begin(config, layout)
        folder = Path(config.run.root) / config.run.name / record.CHECKPOINT_DIR
        found = checkpoint.latest(folder)
        assert found is not None
        assert found.name == f"step_{STEPS:06d}"
        state = checkpoint.load(found, training.policy, training.remembered, config)
        moments = [
            value
            for entry in training.policy.optimizer.optimizer.state.values()
            for value in entry.values()
        ]
        assert moments
        remembered = [
            *(training.remembered.reference or []),
            *(training.remembered.anchor or []),
        ]
        tensors = [*training.policy.copy_weights(), *moments, *remembered]
        return [torch.as_tensor(value).clone() for value in tensors], state.state_dict()

    return run_ranks(ranks_of(config), load)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_run(variant: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    whole = prepared(config, tmp_path, "whole")
    train(whole)

    train(prepared(config, tmp_path, "parts", stop_after=STOP))
    assert [line[record.STEP] for line in metrics(tmp_path, "parts")] == list(range(STOP + 1))
    assert not (tmp_path / "parts" / record.SUMMARY_FILE).exists()
    # The run was killed after two more steps, in the middle of writing a third.
    path = tmp_path / "parts" / record.METRICS_FILE
    lost = ['{"step": 4, "reward/mean": 99.0}', '{"step": 5, "reward/mean": 99.0}', '{"step": 6, "']
    with path.open("a") as file:
        file.write("\n".join(lost))
    resumed = prepared(config, tmp_path, "parts", if_exists="resume")
    train(resumed)

    assert metrics(tmp_path, "parts") == metrics(tmp_path, "whole")
    assert [line[record.STEP] for line in metrics(tmp_path, "whole")] == list(range(STEPS + 1))
    tensors, state = checkpoint_at_the_end(resumed)
    wanted_tensors, wanted_state = checkpoint_at_the_end(whole)
    assert bits_equal(tensors, wanted_tensors)
    for clock in ("wall_s", "warm_start_s"):
        assert state.pop(clock) > 0.0
        assert wanted_state.pop(clock) > 0.0
    assert state == wanted_state
    summaries = [
        json.loads((tmp_path / name / record.SUMMARY_FILE).read_text())
        for name in ("parts", "whole")
    ]
    for key in ("accuracy_start", "reward_final", "samples", "optimizer_steps", "alpha_last"):
        assert summaries[0][key] == summaries[1][key], key


def test_the_example_tells_a_lost_state_from_a_kept_one(tmp_path: Path) -> None:
    """Alpha and weights do change between the stop and the end: equality above means something."""
    config = prepared(VARIANTS["guarded alpha, old anchor"], tmp_path, "run")
    train(config)
    lines = metrics(tmp_path, "run")
    assert len({line[record.ALPHA] for line in lines[STOP + 1 :]}) > 1
    assert len({line[record.GRAD_NORM] for line in lines[1:]}) == STEPS
    assert lines[-1][record.KL_REFERENCE] > lines[1][record.KL_REFERENCE]


@pytest.mark.parametrize(
    ("change", "section"),
    [
        pytest.param({"objective": AdpoSoftmax()}, "objective", id="another objective"),
        pytest.param({"objective": Apo(beta_r=0.7)}, "objective", id="another parameter"),
        pytest.param({"schedule": GuardedSchedule(rho=0.5)}, "schedule", id="another schedule"),
        pytest.param({"anchor": AnchorConfig(name="ema")}, "anchor", id="another anchor"),
    ],
)
def test_resuming_with_another_algorithm_is_refused(
    change: dict[str, Any], section: str, stopped: tuple[Config, Path]
) -> None:
    config, root = stopped
    other = replace(prepared(config, root, "stopped", if_exists="resume"), **change)
    refusal = rf"CheckpointError: cannot resume from .*: {section} was"
    with pytest.raises(RankFailure, match=refusal):
        train(other)


def test_a_checkpoint_of_another_format_is_refused(stopped: tuple[Config, Path]) -> None:
    config, root = stopped
    folder = checkpoint.latest(root / "stopped" / record.CHECKPOINT_DIR)
    assert folder is not None
    path = folder / checkpoint.STATE_FILE
    kept = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(kept), "format": 99}))
        with pytest.raises(RankFailure, match=r"CheckpointError: .* has format 99"):
            train(prepared(config, root, "stopped", if_exists="resume"))
    finally:
        path.write_text(kept)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run stopped after its first step; the tests that use it fail to resume it."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny_config()
    train(prepared(config, root, "stopped", stop_after=1))
    return config, root


def test_a_save_that_was_interrupted_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for name, is_complete in (
        ("step_000002", True),
        ("step_000010", True),
        ("step_000012", False),
        (".partial_step_000014", True),
    ):
        (tmp_path / name).mkdir()
        if is_complete:
            (tmp_path / name / checkpoint.STATE_FILE).write_text("{}")
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.name == "step_000010"


def test_weights_of_what_is_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def load() -> None:
        training = begin(tiny_config())
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            checkpoint.load_weights(tmp_path, training.policy)

    run_ranks(1, load)


def test_saved_weights_start_another_run(tmp_path: Path) -> None:
    def save_and_load() -> None:
        layout = parallel_layout.initialize(parallel(1, 1), 0)
        first = begin(tiny_config(), layout)
        checkpoint.save_weights(tmp_path / "weights", first.policy)
        config = tiny_config()
        other = begin(replace(config, run=replace(config.run, seed=5)), layout)
        assert not bits_equal(other.policy.copy_weights(), first.policy.copy_weights())
        checkpoint.load_weights(tmp_path / "weights", other.policy)
        assert bits_equal(other.policy.copy_weights(), first.policy.copy_weights())

    run_ranks(1, save_and_load)
