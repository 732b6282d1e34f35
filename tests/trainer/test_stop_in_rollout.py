"""An RL step that is stopped between two optimizer steps goes on to the same bits."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import AnchorConfig, Config, ParallelConfig, UpdateConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.objectives import OBJECTIVES, Apo
from nemo_apo.core.temperature import AdaptiveTemperature
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer.interruption import StoppedEarly
from nemo_apo.trainer.pending import StoredRollout
from nemo_apo.trainer.rl_step import StepOutcome, StoppedInRollout
from tests.parallel.ranks import run_ranks

from .tiny_runs import Training, begin, bits_equal, tiny_config

# Four optimizer steps per rollout.
UPDATE = UpdateConfig(mini_batches=2, epochs=2, micro_batch_size=4)
BASE = tiny_config(update=UPDATE)


class StopsAt:
    """Asks to stop at the n-th time that it is asked (from 0), and never again."""

    def __init__(self, when: int) -> None:
        self.left = when

    def requested(self) -> str | None:
        self.left -= 1
        return "the test" if self.left == -1 else None


def through_a_file(stored: StoredRollout) -> StoredRollout:
    """What comes back of its numbers as JSON and its tensors as copies."""
    numbers = json.loads(json.dumps(stored.numbers))
    return StoredRollout({name: value.clone() for name, value in stored.tensors.items()}, numbers)


def step(training: Training, number: int, state: ScheduleState, **options: Any) -> StepOutcome:
    return training.worker.run(number, state, 4 * number, 0, **options)


def figures(outcome: StepOutcome) -> dict[str, float]:
    """The metrics but for times."""
    return {
        name: value
        for name, value in outcome.metrics.items()
        if not name.startswith("time/") and name != record.TOKENS_PER_SECOND
    }


def stopped_and_whole(config: Config, asked: int, layout: Layout | None = None) -> str:
    """Two RL steps, the second stopped once and gone on with, against two that were not."""
    whole = begin(config, layout)
    first = step(whole, 0, ScheduleState())
    wanted = step(whole, 1, first.schedule_state)
    weights = whole.policy.copy_weights()

    other = begin(config, whole.layout)
    assert step(other, 0, ScheduleState()).metrics.keys() == first.metrics.keys()
    other.worker.stop = other.worker.source.stop = StopsAt(asked)
    try:
        got, stopped = step(other, 1, first.schedule_state), "not"
    except StoppedEarly:
        got, stopped = step(other, 1, first.schedule_state), "before"
    except StoppedInRollout as stop:
        stored = through_a_file(stop.rollout)
        got, stopped = step(other, 1, first.schedule_state, stored=stored), "within"
    assert figures(got) == figures(wanted)
    assert replace(got, metrics={}) == replace(wanted, metrics={})
    assert bits_equal(other.policy.copy_weights(), weights)
    assert got.metrics[record.STEP_SECONDS] > 0.0
    return stopped


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BASE, id="APO"),
        pytest.param(replace(BASE, objective=Apo(refresh="stale")), id="APO, stale coefficients"),
        pytest.param(replace(BASE, objective=OBJECTIVES["grpo"]), id="GRPO"),
        pytest.param(
            replace(BASE, tau=AdaptiveTemperature(), anchor=AnchorConfig("ema")),
            id="adaptive tau, moving anchor",
        ),
        pytest.param(
            # At this cap every token that the sampler finds likelier than the trainer is weighed.
            replace(BASE, rollout=replace(BASE.rollout, importance_cap=1.0)),
            id="importance correction",
        ),
    ],
)
def test_one_rank_goes_on_wherever_it_was_stopped(config: Config) -> None:
    def work() -> list[str]:
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
        return [stopped_and_whole(config, asked, layout) for asked in range(8)]

    (stopped,) = run_ranks(1, work, timeout_s=300.0)
    # Before sampling, before and after the log-prob pass; then between the four optimizer steps.
    assert stopped == ["before"] * 3 + ["within"] * 3 + ["not"] * 2


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(2), ParallelConfig(1, 2), ParallelConfig()], ids=["TP", "PP", "DP"]
)
def test_two_ranks_go_on_alike(parallel: ParallelConfig) -> None:
    assert run_ranks(2, stopped_and_whole, replace(BASE, parallel=parallel), 4) == ["within"] * 2


def test_the_stored_rollout_holds_tensors_and_plain_numbers() -> None:
    def work() -> None:
        training = begin(BASE)
        training.worker.stop = training.worker.source.stop = StopsAt(3)
        with pytest.raises(StoppedInRollout, match="the test") as stop:
            training.run()
        stored = stop.value.rollout
        assert all(isinstance(value, Tensor) for value in stored.tensors.values())
        assert all(value.device.type == "cpu" for value in stored.tensors.values())
        assert torch.isfinite(stored.tensors["known_logprob_sums"]).all()
        assert stored.numbers["done"] == 1
        json.dumps(stored.numbers)

    run_ranks(1, work)
