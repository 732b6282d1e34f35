"""The contract that every objective keeps, and the token weights."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from nemo_apo.core.objectives import (
    OBJECTIVES,
    AdpoRanking,
    ClippedRatio,
    Columns,
    Regularizers,
    TokenInputs,
)
from nemo_apo.core.objectives.interface import AGGREGATIONS, token_weights

from .toy_policy import group_batch, hand_batch, make_rollout, random_batch, token_inputs

TERMS = {
    "bare": Regularizers(),
    "k2": Regularizers(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.2),
    "k3": Regularizers(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.2),
}


def weighed(name: str) -> tuple[TokenInputs, Columns]:
    rollout, objective = make_rollout(), OBJECTIVES[name]
    columns = objective.weigh(group_batch(rollout, objective), 0.6).columns
    inputs = token_inputs(rollout, torch.arange(rollout.size))
    leaves = {
        field.name: getattr(inputs, field.name).detach() for field in dataclasses.fields(inputs)
    }
    return TokenInputs(**leaves), columns


def loss_and_slopes(
    name: str, terms: str, inputs: TokenInputs, columns: Columns
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss and its derivative in the log-probs and in the entropy of each token."""
    live = replace(
        inputs,
        logprobs_BT=inputs.logprobs_BT.clone().requires_grad_(),
        entropy_BT=inputs.entropy_BT.clone().requires_grad_(),
    )
    loss = OBJECTIVES[name].token_loss(live, columns) + TERMS[terms].token_loss(live, columns)
    leaves = (live.logprobs_BT, live.entropy_BT)
    by_logprob, by_entropy = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return float(loss.detach()), by_logprob, by_entropy


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights_worked_numbers(aggregation: str) -> None:
    # Groups of 3 and 2 completions with 1, 2, 5 and 4, 8 tokens; length limit 16.
    batch = hand_batch([0, 0, 1, 0, 1], [0.0] * 5, lengths=[1, 2, 4, 5, 8])
    expected = {
        "sequence_mean": [1 / 6, 1 / 12, 1 / 16, 1 / 30, 1 / 32],
        "group_token_mean": [1 / 16, 1 / 16, 1 / 24, 1 / 16, 1 / 24],
        "batch_token_mean": [1 / 20] * 5,
        "constant": [1 / 96, 1 / 96, 1 / 64, 1 / 96, 1 / 64],
    }[aggregation]
    weights_N = token_weights(batch, aggregation)
    # To the last digits: a division of integers would come out in float32.
    assert weights_N.dtype == torch.float64
    assert weights_N.tolist() == pytest.approx(expected, rel=1e-15)


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.aggregation must be one of .* got 'mean'"):
        token_weights(hand_batch([0, 0], [0.0, 0.0]), "mean")


def test_select_takes_rows_of_every_column_in_order() -> None:
    columns = Columns(*(torch.arange(4) + offset for offset in (0, 10, 20)))
    chosen = columns.select(torch.tensor([3, 1]))
    assert [getattr(chosen, field.name).tolist() for field in dataclasses.fields(chosen)] == [
        [3, 1],
        [13, 11],
        [23, 21],
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weigh_gives_finite_float64_columns(name: str) -> None:
    objective, batch = OBJECTIVES[name], random_batch(seed=0)
    assert objective.name == name
    assert hash(objective) == hash(replace(objective))
    columns = objective.weigh(batch, 0.6).columns
    for field in dataclasses.fields(columns):
        column_N = getattr(columns, field.name)
        assert column_N.dtype == torch.float64
        assert column_N.shape == (9,)
        assert not column_N.requires_grad
        assert column_N.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flags_say_what_weigh_reads(name: str) -> None:
    objective, batch = OBJECTIVES[name], random_batch(seed=0)
    before = objective.weigh(batch, 0.6).columns
    changed = {
        "uses_alpha": objective.weigh(batch, 0.2),
        "uses_anchor": objective.weigh(
            replace(batch, anchor_logprob_sums_N=batch.anchor_logprob_sums_N.flip(0)), 0.6
        ),
        "weighs_current_policy": objective.weigh(
            replace(batch, logprob_sums_N=batch.logprob_sums_N.flip(0)), 0.6
        ),
    }
    for flag, weighing in changed.items():
        same = all(
            torch.equal(getattr(weighing.columns, field.name), getattr(before, field.name))
            for field in dataclasses.fields(before)
        )
        assert same != getattr(objective, flag), flag


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_positions_are_never_read(name: str, terms: str, bad: float) -> None:
    inputs, columns = weighed(name)
    soiled = {
        field: torch.where(inputs.mask_BT, getattr(inputs, field), bad)
        for field in ("logprobs_BT", "old_logprobs_BT", "reference_logprobs_BT", "entropy_BT")
    }
    clean_loss, *clean = loss_and_slopes(name, terms, inputs, columns)
    loss, *slopes = loss_and_slopes(name, terms, replace(inputs, **soiled), columns)
    assert loss == clean_loss
    for slopes_BT, clean_BT in zip(slopes, clean, strict=True):
        assert torch.equal(slopes_BT, clean_BT)
        assert not slopes_BT[~inputs.mask_BT].any()
    counted = OBJECTIVES[name].clipped_tokens(replace(inputs, **soiled), columns)
    assert int(counted) == int(OBJECTIVES[name].clipped_tokens(inputs, columns))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_all_masked_micro_batch_is_a_connected_zero(name: str, terms: str) -> None:
    inputs, columns = weighed(name)
    empty = replace(inputs, mask_BT=torch.zeros_like(inputs.mask_BT))
    loss, by_logprob, by_entropy = loss_and_slopes(name, terms, empty, columns)
    assert loss == 0.0
    assert not by_logprob.any()
    assert not by_entropy.any()
    live = replace(empty, logprobs_BT=empty.logprobs_BT.clone().requires_grad_())
    assert OBJECTIVES[name].token_loss(live, columns).requires_grad
    assert int(OBJECTIVES[name].clipped_tokens(empty, columns)) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_integer_mask_is_as_good_as_a_bool(name: str) -> None:
    inputs, columns = weighed(name)
    as_integer = replace(inputs, mask_BT=inputs.mask_BT.long())
    for terms in TERMS:
        first = loss_and_slopes(name, terms, inputs, columns)
        second = loss_and_slopes(name, terms, as_integer, columns)
        assert first[0] == second[0]
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_log_probs_keep_their_dtype(name: str) -> None:
    inputs, columns = weighed(name)
    single = replace(
        inputs,
        **{
            field.name: getattr(inputs, field.name).float()
            for field in dataclasses.fields(inputs)
            if field.name != "mask_BT"
        },
    )
    for terms in TERMS.values():
        loss = OBJECTIVES[name].token_loss(single, columns) + terms.token_loss(single, columns)
        exact = OBJECTIVES[name].token_loss(inputs, columns) + terms.token_loss(inputs, columns)
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(float(exact), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("objective", [AdpoRanking, ClippedRatio])
def test_a_shared_class_refuses_a_name_that_is_not_its_own(objective: type) -> None:
    with pytest.raises(ValueError, match=r"objective\.name must be one of .*'gspo'"):
        objective(name="gspo")
