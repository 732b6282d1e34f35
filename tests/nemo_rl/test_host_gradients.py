"""Gradients of the host's own workers under APO: those of the coupled loss of whole groups.

The oracle is autograd through the loss of a whole optimizer step in one piece, in float64, in
Hugging Face's model; the workers compute in float32.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.nemo_rl.coupled import ALPHA, COUPLED
from tests.nemo_rl.host_config import GROUP_SIZE, LR
from tests.nemo_rl.host_session import (
    SIZE,
    Named,
    PlainModel,
    Rollout,
    Session,
    largest_gap,
    made_rollout,
    open_session,
    read,
)

pytestmark = [
    pytest.mark.nemo_rl,
    pytest.mark.slow(reason="starts Ray and two workers of each kind"),
]

FIXED = {"schedule": {"name": "fixed", "alpha": ALPHA}}
# Of the largest gradient. Coefficients of later steps are read from log-probs of whole sequences in
# float32, whose change since the rollout is divided by tau.
TOLERANCE, TOLERANCE_OF_LATER_STEPS = 1e-6, 1e-5


def spread_groups(count: int) -> list[int]:
    """Rows of an optimizer step in an order that puts every group on both ranks."""
    return [row * 3 % count for row in range(count)]


def session_of(workers: Any, objective: str = "apo") -> Session:
    return open_session(workers, workers.first_weights, objective={"name": objective}, **FIXED)


def expect_same(found: list[Named], exact: list[Named]) -> None:
    """The gradients of every optimizer step."""
    tolerances = [TOLERANCE, *[TOLERANCE_OF_LATER_STEPS] * (len(exact) - 1)]
    gaps = [largest_gap(one, other) for one, other in zip(found, exact, strict=True)]
    scales = [max(float(part.abs().max()) for part in one.values()) for one in exact]
    assert min(scales) > 1e-2, "nothing to compare"
    relative = [gap / scale for gap, scale in zip(gaps, scales, strict=True)]
    assert all(one < most for one, most in zip(relative, tolerances, strict=True)), relative


@pytest.mark.parametrize("objective", COUPLED)
def test_two_optimizer_steps_of_a_rollout(workers: Any, model: str, objective: str) -> None:
    """The second one stands on log-probs of the policy that the first one has moved."""
    rollout = made_rollout(seed=1)
    session, plain = session_of(workers, objective), PlainModel(model, LR)
    found, exact = session.train(rollout), plain.train(rollout, COUPLED[objective])
    assert len(found) == 2
    expect_same(found, exact)
    weights = {name: weight.detach() for name, weight in plain.model.named_parameters()}
    assert largest_gap(workers.weights(), weights) < TOLERANCE


@pytest.fixture(params=["shuffled", "dynamic batches", "shuffled, single sequences"])
def cut(workers: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The workers, cutting optimizer steps in another way."""
    if "shuffled" in request.param:
        workers.order = spread_groups
    if "dynamic" in request.param:
        workers.use_dynamic_batching(True)
    if "single" in request.param:
        workers.micro_batch_size = 1
    yield workers
    workers.order = workers.micro_batch_size = None
    workers.use_dynamic_batching(False)


@pytest.mark.parametrize("objective", ["apo", "dapo"])
def test_however_an_optimizer_step_is_cut(cut: Any, model: str, objective: str) -> None:
    rollout = made_rollout(seed=2)
    plain = PlainModel(model, LR)
    expect_same(session_of(cut, objective).train(rollout), plain.train(rollout, COUPLED[objective]))


@pytest.mark.parametrize("order", [None, spread_groups], ids=["in order", "shuffled"])
@pytest.mark.parametrize("objective", ["apo", "adpo_pairwise", "dapo"])
def test_packed_sequences(packing_workers: Any, model: str, objective: str, order: Any) -> None:
    """Log-probs, refresh and training all read packs."""
    rollout = made_rollout(seed=6)
    packing_workers.order = order
    session, plain = session_of(packing_workers, objective), PlainModel(model, LR)
    exact = plain.logprobs(rollout.tokens).detach()
    found = read(packing_workers, rollout)[:, 1:].double()
    assert float(((found - exact) * rollout.mask).abs().max()) < TOLERANCE
    expect_same(session.train(rollout), plain.train(rollout, COUPLED[objective]))


def test_log_probs_that_were_not_refreshed_would_show(workers: Any, model: str) -> None:
    """What the other tests would see of a second step at the log-probs of the rollout."""
    rollout = made_rollout(seed=1)
    found = session_of(workers).train(rollout)
    moved = PlainModel(model, LR)

    def stale(new: Any, old: Any, mask: Any, advantages: Any) -> Any:
        return COUPLED["apo"](old + (new - new.detach()), old, mask, advantages)

    assert largest_gap(found[1], moved.train(rollout, stale)[1]) > 1e-3


def without(rollout: Rollout, group: int) -> Rollout:
    """The rollout without one of its groups."""
    keep = torch.arange(len(rollout.rewards)) // GROUP_SIZE != group
    parts = (rollout.tokens, rollout.lengths, rollout.rewards, rollout.sample_mask)
    return Rollout(*(part[keep] for part in parts))


@pytest.mark.parametrize("group", [0, 1])
def test_a_masked_sequence_takes_its_group_out(workers: Any, model: str, group: int) -> None:
    """One of an optimizer step's two groups, which is all that one of the two ranks has."""
    rollout = made_rollout(seed=3, groups=2)
    masked = replace(rollout, sample_mask=torch.ones(SIZE))
    masked.sample_mask[group * GROUP_SIZE + 1] = 0.0
    session = session_of(workers)
    found = session.train(masked)
    kept, loss = without(rollout, group), COUPLED["apo"]
    expect_same(found, PlainModel(model, LR).train(kept, loss, size=GROUP_SIZE))
    assert session.figure("num_valid_samples") == GROUP_SIZE
    assert session.figure("apo/groups_dropped") == 1.0


def test_figures_of_an_rl_step(workers: Any) -> None:
    """By the host's names, each counted once although two workers and two steps report."""
    rollout = made_rollout(seed=4)
    session = session_of(workers)
    session.train(rollout)
    assert session.figure("apo/alpha") == ALPHA
    assert session.figure("apo/reward_mean") == pytest.approx(
        float(rollout.rewards.mean()), abs=1e-7
    )
    assert session.figure("token_mult_prob_error") == pytest.approx(1.0, abs=1e-5)
    assert session.figure("gen_kl_error") == pytest.approx(0.0, abs=1e-6)
    assert session.figure("num_valid_samples") == SIZE
    assert session.results[-1]["loss"].shape == (1,)


def test_a_schedule_goes_on_from_step_to_step(workers: Any) -> None:
    sections: dict[str, Any] = {"schedule": {"name": "linear"}}
    session = open_session(workers, workers.first_weights, **sections)
    alphas = []
    for seed in range(3):
        session.train(made_rollout(seed))
        alphas.append(session.figure("apo/alpha"))
    assert alphas[0] > alphas[1] > alphas[2]
    assert session.run.state.rl_steps == 3
