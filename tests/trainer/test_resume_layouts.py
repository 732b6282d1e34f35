"""A checkpoint of one parallel layout goes on in another, Adam's moments included."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nemo_apo.config import Config, ParallelConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint import TrainerState
from nemo_apo.trainer.checkpoint_search import newest_verified
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, Training, begin, largest_gap, parallel, tiny_config

# Largest difference of a weight after another RL step, in the same steps without a checkpoint
# between the layouts: rounding in float32.
ROUNDING = 2e-6
SHARDED = ParallelConfig(distributed_optimizer=True)
PLAIN = ParallelConfig()
LAYOUTS = {
    "TP2": (parallel(2, 1), 2),
    "PP2": (parallel(1, 2), 2),
    "DP2": (parallel(1, 1), 2),
    "TP2 x PP2": (parallel(2, 2), 4),
}


def of(layout: ParallelConfig) -> Config:
    config = tiny_config(parallel=layout, model=replace(TINY_MODEL, num_layers=2))
    return replace(config, optimizer=replace(config.optimizer, weight_decay=0.1))


def one_step_more(training: Training, state: TrainerState) -> dict[str, Tensor]:
    """The whole model after another RL step, which reads every moment."""
    training.worker.run(state.step, state.schedule, state.optimizer_steps, 0)
    return training.weights()


def save_and_go_on(config: Config, root: Path) -> dict[str, Tensor]:
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    training = begin(config, layout)
    training.run(2)
    state = TrainerState(
        step=2, schedule=ScheduleState(), diagnostics=DiagnosticsState(), optimizer_steps=4
    )
    checkpoint.save(root, training.policy, training.remembered, state, config, {})
    return one_step_more(training, state)


def load_and_go_on(config: Config, root: Path) -> dict[str, Tensor]:
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    training = begin(config, layout)
    found = newest_verified(root)
    assert found is not None
    state, _ = checkpoint.load(found.newest, training.policy, training.remembered, config)
    return one_step_more(training, state)


def gap(saved: ParallelConfig, ranks: int, loaded: ParallelConfig, more: int, root: Path) -> float:
    wanted = run_ranks(ranks, save_and_go_on, of(saved), root)[0]
    got = run_ranks(more, load_and_go_on, of(loaded), root)[0]
    return largest_gap(wanted, got)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_goes_on_in_a_layout(name: str, tmp_path: Path) -> None:
    layout, ranks = LAYOUTS[name]
    assert gap(PLAIN, 1, layout, ranks, tmp_path) < ROUNDING


@pytest.mark.parametrize("pair", [("TP2", "PP2"), ("PP2", "DP2"), ("TP2 x PP2", "TP2")], ids=str)
def test_a_layout_goes_on_in_another(pair: tuple[str, str], tmp_path: Path) -> None:
    (saved, ranks), (loaded, more) = LAYOUTS[pair[0]], LAYOUTS[pair[1]]
    assert gap(saved, ranks, loaded, more, tmp_path) < ROUNDING


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=str)
def test_a_sharded_optimizer_goes_on_over_another_number_of_ranks(
    ranks: tuple[int, int], tmp_path: Path
) -> None:
    assert gap(SHARDED, ranks[0], SHARDED, ranks[1], tmp_path) < ROUNDING


def test_a_sharded_optimizer_goes_on_in_another_layout(tmp_path: Path) -> None:
    loaded = replace(parallel(2, 1), distributed_optimizer=True)
    assert gap(SHARDED, 2, loaded, 2, tmp_path) < ROUNDING


def test_lost_moments_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound above tells kept moments from fresh ones."""

    def forget(optimizer: Any, loaded: dict[str, Any]) -> None:
        pass

    wanted = run_ranks(1, save_and_go_on, of(PLAIN), tmp_path)[0]
    monkeypatch.setattr(checkpoint, "take_optimizer", forget)
    got = run_ranks(1, load_and_go_on, of(PLAIN), tmp_path)[0]
    assert largest_gap(wanted, got) > 100 * ROUNDING
