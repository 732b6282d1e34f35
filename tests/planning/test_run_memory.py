"""The memory of a run, added up by hand for a decoder of a few numbers."""

from dataclasses import replace

import pytest

from nemo_apo.config import (
    AnchorConfig,
    Config,
    ParallelConfig,
    RolloutConfig,
    UpdateConfig,
)
from nemo_apo.planning.run_memory import run_memory
from nemo_apo.tasks import SortTask
from tests.planning.small import SMALL

# Prompts of 5 tokens, answers of at most 6; the vocabulary of 12 is padded to 32.
CONFIG = Config(
    task=SortTask(length=4),
    model=SMALL,
    rollout=RolloutConfig(prompts=4, group_size=2, micro_batch_size=4),
    update=UpdateConfig(mini_batches=2, micro_batch_size=1, log_prob_micro_batch_size=2),
)
LAYER = 576 + 20
WEIGHTS = 4 * LAYER + 2 * 32 * 8 + 8


def test_what_is_held_on_one_rank() -> None:
    assert run_memory(CONFIG, 1).held == {
        "weights": 2 * WEIGHTS,
        "gradients": 4 * WEIGHTS,
        "optimizer": 12 * WEIGHTS,
        "copies": 2 * WEIGHTS,  # the policy at the start, for its KL
        "replica": 0,
    }


def test_the_phases_beside_it() -> None:
    phases = run_memory(CONFIG, 1).phases
    # Two rows of 11 tokens: scores of 4 heads in bfloat16 and twice in float32, the hidden states
    # before and after.
    scores = (2 + 4 + 4) * 4 * (2 * 11 * 11)
    assert phases["log-prob pass"] == scores + 2 * 2 * 22 * 8
    # Four rows: keys and values of 2 groups x 2 in 4 layers, and three distributions over 32.
    cache = 2 * 2 * 4 * 4 * (4 * 11)
    assert phases["sampling"] == cache + max(10 * 4 * 4 * 5 * 5, 3 * 8 * 4 * 32)


def test_the_total_is_the_held_part_and_the_largest_phase() -> None:
    memory = run_memory(CONFIG, 1)
    assert memory.total == sum(memory.held.values()) + max(memory.phases.values())
    assert str(memory).startswith(f"{memory.total / 1e6:.1f} MB (weights ")


@pytest.mark.parametrize(
    ("anchor", "monitor", "copies"),
    [("old", False, 0), ("reference", False, 1), ("ema", False, 1), ("ema", True, 2)],
)
def test_copies_of_the_weights(anchor: str, monitor: bool, copies: int) -> None:
    config = replace(
        CONFIG,
        anchor=AnchorConfig(name=anchor),
        update=replace(CONFIG.update, monitor_reference_kl=monitor),
    )
    assert run_memory(config, 1).held["copies"] == copies * 2 * WEIGHTS


def test_a_model_parallel_policy_samples_from_a_replica() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    held = run_memory(replace(CONFIG, parallel=parallel), 4).held
    assert held["replica"] == 2 * WEIGHTS
    assert 2 * WEIGHTS / 2 < held["weights"] < 2 * WEIGHTS


def test_transformer_engine_keeps_no_scores_but_a_replica() -> None:
    model = replace(SMALL, transformer_impl="transformer_engine")
    memory, local = run_memory(replace(CONFIG, model=model), 1), run_memory(CONFIG, 1)
    assert memory.held == {**local.held, "replica": 2 * WEIGHTS}
    # The feed-forward of two rows of 11 tokens in place of their scores, or their log-probs.
    assert memory.phases["log-prob pass"] < local.phases["log-prob pass"]
    assert memory.phases["optimizer step"] < local.phases["optimizer step"]
    assert memory.phases["sampling"] == local.phases["sampling"]
    auto = replace(SMALL, transformer_impl="auto")
    assert run_memory(replace(CONFIG, model=auto), 1) == local


def test_a_policy_that_samples_as_it_trains_has_no_replica() -> None:
    rollout = replace(CONFIG.rollout, tensor_model_parallel_size=2)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    config = replace(CONFIG, parallel=parallel, rollout=rollout)
    assert run_memory(config, 4).held["replica"] == 0
    stages = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert run_memory(replace(config, parallel=stages), 4).held["replica"] == WEIGHTS


def test_a_wider_micro_batch_needs_more() -> None:
    wide = replace(CONFIG, update=replace(CONFIG.update, micro_batch_size=4))
    narrow = run_memory(CONFIG, 1)
    assert run_memory(wide, 1).phases["optimizer step"] > narrow.phases["optimizer step"]
    assert run_memory(wide, 1).held == narrow.held
