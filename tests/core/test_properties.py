"""What must hold for every batch, drawn by hypothesis (deterministically)."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_apo.core.advantages import group_advantages
from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import OBJECTIVES, Columns, GroupBatch

DETERMINISTIC = settings(derandomize=True, deadline=None, database=None, max_examples=12)
ANCHORED = ("apo", "adpo_softmax", "adpo_plackett_luce", "adpo_pairwise")
ALPHAS = st.sampled_from([0.0, 0.35, 0.5, 0.9, 1.0])
each_anchored = pytest.mark.parametrize("name", ANCHORED)
each_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])
each_no_signal = pytest.mark.parametrize("no_signal", ["anchor", "drop"])
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


@st.composite
def batches(draw: Any) -> GroupBatch:
    """One to four ragged groups, interleaved; tied, graded and equal rewards; any drift."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    ids = draw(st.permutations([i for i, size in enumerate(sizes) for _ in range(size)]))
    count = len(ids)

    def column(values: st.SearchStrategy) -> Tensor:
        drawn = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.float64)

    groups = Groups.from_ids(torch.tensor(ids))
    rewards_N = column(st.sampled_from([0.0, 0.0, 1.0, 0.7, 1.0 / 3.0]))
    old_N, drift = column(st.floats(-60.0, -1.0)), st.floats(-4.0, 4.0)
    tau = draw(st.lists(st.sampled_from([0.2, 0.8, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    return GroupBatch(
        groups=groups,
        advantages_N=group_advantages(rewards_N, groups, "zscore"),
        lengths_N=column(st.integers(1, 20)),
        logprob_sums_N=old_N + column(drift),
        old_logprob_sums_N=old_N,
        anchor_logprob_sums_N=old_N + column(drift),
        tau_N=groups.spread(torch.tensor(tau, dtype=torch.float64)),
        max_response_length=24,
    )


def rearranged(batch: GroupBatch, rows: Tensor, ids_N: Tensor) -> GroupBatch:
    """Some sequences of a batch in another order, with these group ids."""
    columns = {
        field.name: getattr(batch, field.name)[rows]
        for field in dataclasses.fields(batch)
        if field.name not in ("groups", "max_response_length")
    }
    return replace(batch, groups=Groups.from_ids(ids_N), **columns)


def assert_same(actual: Columns, expected: Columns, share: float = 1.0) -> None:
    """Equal to rounding, up to the share that a sum over groups gives each."""
    for field in dataclasses.fields(actual):
        wanted = getattr(expected, field.name)
        wanted = wanted if field.name == "advantage_N" else share * wanted
        bound = 1e-12 * max(1.0, float(wanted.abs().max()))
        assert (getattr(actual, field.name) - wanted).abs().max() <= bound, field.name


@each_anchored
@each_reduction
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS, shift=st.floats(-50.0, 50.0))
def test_a_shift_of_a_whole_group_changes_nothing(
    name: str, reduction: str, batch: GroupBatch, alpha: float, shift: float
) -> None:
    objective = replace(OBJECTIVES[name], logprob_reduction=reduction)
    per_sum_N = batch.lengths_N if reduction == "mean" else torch.ones_like(batch.lengths_N)
    shift_N = torch.where(batch.groups.index_N == 0, shift * per_sum_N, 0.0)
    shifted = replace(batch, logprob_sums_N=batch.logprob_sums_N + shift_N)
    expected, actual = objective.weigh(batch, alpha), objective.weigh(shifted, alpha)
    # The shift itself rounds u by up to 1e-12, and phi may multiply that by exp(u).
    bound = 1e-9 * max(1.0, float(expected.columns.coefficient_N.abs().max()))
    difference_N = actual.columns.coefficient_N - expected.columns.coefficient_N
    assert difference_N.abs().max() <= bound
    assert abs(float(actual.value - expected.value)) <= 1e-9 * max(1.0, float(expected.value))


@each_anchored
@each_reduction
@each_no_signal
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS)
def test_coefficients_of_a_group_sum_to_zero(
    name: str, reduction: str, no_signal: str, batch: GroupBatch, alpha: float
) -> None:
    # What sums to zero is dLoss/dl_i; a token of the mean carries 1 / T_i of it.
    objective = replace(OBJECTIVES[name], logprob_reduction=reduction, no_signal=no_signal)
    slope_N = objective.weigh(batch, alpha).columns.coefficient_N
    if reduction == "mean":
        slope_N = slope_N * batch.lengths_N
    scale = max(1.0, float(slope_N.abs().max()))
    assert batch.groups.sum(slope_N).abs().max() <= 1e-13 * scale


@each_objective
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS, seed=st.integers(0, 99))
def test_permuting_sequences_permutes_columns(
    name: str, batch: GroupBatch, alpha: float, seed: int
) -> None:
    ids_N = batch.groups.ids_G[batch.groups.index_N]
    rows = torch.randperm(ids_N.numel(), generator=torch.Generator().manual_seed(seed))
    expected = OBJECTIVES[name].weigh(batch, alpha)
    actual = OBJECTIVES[name].weigh(rearranged(batch, rows, ids_N[rows]), alpha)
    assert_same(actual.columns, expected.columns.select(rows))


@each_objective
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS)
def test_ragged_groups_are_weighed_as_if_alone(name: str, batch: GroupBatch, alpha: float) -> None:
    expected = OBJECTIVES[name].weigh(batch, alpha)
    for g in range(batch.groups.count):
        rows = torch.nonzero(batch.groups.index_N == g).flatten()
        alone = OBJECTIVES[name].weigh(rearranged(batch, rows, torch.zeros_like(rows)), alpha)
        share = 1.0 / batch.groups.count
        assert_same(expected.columns.select(rows), alone.columns, share)


@each_objective
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS, ids=st.permutations([-5, 0, 17, 2**40]))
def test_relabelling_groups_changes_nothing(
    name: str, batch: GroupBatch, alpha: float, ids: list[int]
) -> None:
    rows = torch.arange(batch.groups.index_N.numel())
    relabelled = rearranged(batch, rows, torch.tensor(ids)[batch.groups.index_N])
    expected = OBJECTIVES[name].weigh(batch, alpha)
    assert_same(OBJECTIVES[name].weigh(relabelled, alpha).columns, expected.columns)


@each_objective
@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS)
def test_weigh_is_finite_and_changes_nothing_it_is_given(
    name: str, batch: GroupBatch, alpha: float
) -> None:
    before = {
        field.name: getattr(batch, field.name).clone()
        for field in dataclasses.fields(batch)
        if field.name not in ("groups", "max_response_length")
    }
    weighing = OBJECTIVES[name].weigh(batch, alpha)
    assert weighing.columns.coefficient_N.isfinite().all()
    assert weighing.value is None or weighing.value.isfinite()
    for key, value in before.items():
        assert torch.equal(getattr(batch, key), value)


@DETERMINISTIC
@given(batch=batches(), alpha=ALPHAS)
def test_a_divergence_is_never_negative(batch: GroupBatch, alpha: float) -> None:
    assert float(OBJECTIVES["apo"].weigh(batch, alpha).value) >= -1e-14
