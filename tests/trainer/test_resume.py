"""A stopped and resumed run goes on exactly as the run that was never stopped."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_apo import record
from nemo_apo.config import (
    AnchorConfig,
    Config,
    OptimizerConfig,
    ParallelConfig,
)
from nemo_apo.core.alpha_schedule import EssSchedule, GuardedSchedule
from nemo_apo.core.objectives import AdpoSoftmax, Apo
from nemo_apo.core.temperature import AdaptiveTemperature
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint import CheckpointError
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks

from .resumed_runs import STEPS, checkpoint_at_the_end, metrics, prepared, train
from .tiny_runs import TINY_MODEL, TokenSumTask, begin, bits_equal, parallel, tiny_config

STOP = 3
# Gates that open within six steps, so that alpha's memory matters.
LIVELY = GuardedSchedule(confidence="token", rho=0.5, rho_r=0.5)
SHARDED = ParallelConfig(distributed_optimizer=True)
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
    "adaptive tau": tiny_config(tau=AdaptiveTemperature()),
    "optimizer sharded over two ranks": tiny_config(parallel=SHARDED),
    "bfloat16, optimizer sharded over two ranks": tiny_config(
        model=replace(TINY_MODEL, params_dtype="bfloat16"), parallel=SHARDED
    ),
}
# Data-parallel ranks where there is more than one.
REPLICAS = dict.fromkeys((name for name in VARIANTS if "sharded" in name), 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_run(variant: str, tmp_path: Path) -> None:
    config, data = VARIANTS[variant], REPLICAS.get(variant, 1)
    whole = prepared(config, tmp_path, "whole")
    train(whole, data)

    train(prepared(config, tmp_path, "parts", stop_after=STOP), data)
    assert [line[record.STEP] for line in metrics(tmp_path, "parts")] == list(range(STOP + 1))
    assert not (tmp_path / "parts" / record.SUMMARY_FILE).exists()
    # The run was killed after two more steps, in the middle of writing a third.
    path = tmp_path / "parts" / record.METRICS_FILE
    lost = ['{"step": 4, "reward/mean": 99.0}', '{"step": 5, "reward/mean": 99.0}', '{"step": 6, "']
    with path.open("a") as file:
        file.write("\n".join(lost))
    resumed = prepared(config, tmp_path, "parts", if_exists="resume")
    train(resumed, data)

    assert metrics(tmp_path, "parts") == metrics(tmp_path, "whole")
    assert [line[record.STEP] for line in metrics(tmp_path, "whole")] == list(range(STEPS + 1))
    ends = zip(
        checkpoint_at_the_end(resumed, data), checkpoint_at_the_end(whole, data), strict=True
    )
    for (tensors, state), (wanted_tensors, wanted_state) in ends:
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
    ("change", "difference"),
    [
        pytest.param(
            {"objective": AdpoSoftmax()},
            'objective.name was "apo" and is now "adpo_softmax"',
            id="another objective",
        ),
        pytest.param(
            {"objective": Apo(beta_r=0.7)},
            "objective.beta_r was 0.3 and is now 0.7",
            id="another parameter",
        ),
        pytest.param(
            {"schedule": GuardedSchedule(rho=0.5)},
            "schedule.rho was 0.8 and is now 0.5",
            id="another schedule",
        ),
        pytest.param(
            {"anchor": AnchorConfig(name="ema")},
            'anchor.name was "old" and is now "ema"',
            id="another anchor",
        ),
        pytest.param(
            {"task": TokenSumTask(length=5)}, "task.length was 4 and is now 5", id="another task"
        ),
        pytest.param(
            {"parallel": SHARDED},
            "parallel.distributed_optimizer was false and is now true",
            id="optimizer sharded",
        ),
    ],
)
def test_resuming_with_another_algorithm_is_refused(
    change: dict[str, Any], difference: str, stopped: tuple[Config, Path]
) -> None:
    config, root = stopped
    other = replace(prepared(config, root, "stopped", if_exists="resume"), **change)
    refusal = rf"CheckpointError: cannot resume from .*{re.escape(difference)}"
    with pytest.raises(RankFailure, match=refusal):
        train(other)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run stopped after its first step; the tests that use it fail to resume it."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny_config()
    train(prepared(config, root, "stopped", stop_after=1))
    return config, root


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    every = {"save_every": 2, "keep_last": 2}
    config = tiny_config(schedule=LIVELY)
    for name in ("whole", "damaged"):
        train(prepared(config, tmp_path, name, **every))
    folder = tmp_path / "damaged" / record.CHECKPOINT_DIR
    os.truncate(folder / "step_000006" / "common.pt", 7)
    resumed = prepared(config, tmp_path, "damaged", if_exists="resume", console="plain", **every)
    train(resumed)
    told = " ".join(capfd.readouterr().out.split())
    assert "step_000006 is damaged and was passed over: common.pt has 7 bytes" in told
    assert "at step 4" in told
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged_step_000006",
        "step_000004",
        "step_000006",
    ]
    assert metrics(tmp_path, "damaged") == metrics(tmp_path, "whole")
    (tensors, _), *_ = checkpoint_at_the_end(resumed)
    (wanted, _), *_ = checkpoint_at_the_end(prepared(config, tmp_path, "whole", **every))
    assert bits_equal(tensors, wanted)


def test_weights_of_what_is_no_checkpoint_are_refused(tmp_path: Path) -> None:
    def load() -> None:
        training = begin(tiny_config())
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            checkpoint.load_weights(tmp_path, training.policy)

    run_ranks(1, load)


@pytest.mark.parametrize(
    ("dtype", "sharded"), [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_saved_weights_start_another_run(dtype: str, sharded: bool, tmp_path: Path) -> None:
    config = tiny_config(
        model=replace(TINY_MODEL, params_dtype=dtype),
        parallel=SHARDED if sharded else parallel(1, 1),
    )

    def save_and_load() -> None:
        layout = parallel_layout.initialize(config.parallel, 0)
        first = begin(config, layout)
        checkpoint.save_weights(tmp_path / "weights", first.policy)
        other = begin(replace(config, run=replace(config.run, seed=5)), layout)
        assert not bits_equal(other.policy.copy_weights(), first.policy.copy_weights())
        checkpoint.load_weights(tmp_path / "weights", other.policy)
        assert bits_equal(other.policy.copy_weights(), first.policy.copy_weights())
        # Nor does an optimizer step that goes nowhere bring the old ones back.
        other.policy.update(lr=0.0, loss_sum=0.0)
        assert bits_equal(other.policy.copy_weights(), first.policy.copy_weights())

    run_ranks(2 if sharded else 1, save_and_load)
