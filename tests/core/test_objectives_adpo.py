"""The ADPO family: values and gradients in u."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.core.groups import Groups
from nemo_apo.core.objectives import AdpoRanking, AdpoSoftmax, Apo
from nemo_apo.core.objectives.adpo import pairwise_loss, plackett_luce_loss, softmax_loss

from .toy_policy import hand_batch, random_batch

RANKINGS = {"plackett_luce": plackett_luce_loss, "pairwise": pairwise_loss}
# Ties at the top, in the middle and at the bottom; the last group is one tie.
IDS = [0, 1, 0, 1, 0, 2, 1, 1, 0, 2, 1, 3, 3]
TIED = [1.0, 2.0, 0.0, 1.0, 1.0, 0.3, 1.0, 0.0, -1.0, 0.7, 0.0, 0.5, 0.5]


def random_u(seed: int = 0, scale: float = 1.5) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(IDS), generator=random, dtype=torch.float64)


def breslow(u: list[float], a: list[float]) -> tuple[float, list[float]]:
    """Loss and gradient of one group, block by block from the best advantage down."""
    loss, grad = 0.0, [0.0] * len(u)
    for level in sorted(set(a), reverse=True):
        risk_set = [j for j in range(len(u)) if a[j] <= level]
        norm = math.fsum(math.exp(u[j]) for j in risk_set)
        for i in range(len(u)):
            if a[i] == level:
                loss -= u[i] - math.log(norm)
                grad[i] -= 1.0
                for j in risk_set:
                    grad[j] += math.exp(u[j]) / norm
    return loss / len(u), [g / len(u) for g in grad]


def ordered_pairs(u: list[float], a: list[float]) -> tuple[float, list[float]]:
    pairs = [(i, j) for i, j in itertools.permutations(range(len(u)), 2) if a[i] > a[j]]
    grad = [0.0] * len(u)
    for i, j in pairs:
        push = 1.0 / (1.0 + math.exp(u[i] - u[j])) / len(pairs)
        grad[i] -= push
        grad[j] += push
    loss = math.fsum(math.log1p(math.exp(u[j] - u[i])) for i, j in pairs)
    return loss / max(1, len(pairs)), grad


@pytest.mark.parametrize(
    ("name", "oracle"), [("plackett_luce", breslow), ("pairwise", ordered_pairs)]
)
def test_ties_against_a_slow_loop(name: str, oracle: Any) -> None:
    groups, u_N, a_N = Groups.from_ids(torch.tensor(IDS)), random_u(), torch.tensor(TIED).double()
    loss = RANKINGS[name](u_N, a_N, groups)
    for g in range(groups.count):
        rows = groups.index_N == g
        value, grad = oracle(u_N[rows].tolist(), a_N[rows].tolist())
        assert float(loss.value_G[g]) == pytest.approx(value, rel=1e-12)
        assert loss.grad_N[rows].tolist() == pytest.approx(grad, rel=1e-12, abs=1e-15)


def test_without_ties_it_is_the_textbook_plackett_luce() -> None:
    # -log of the probability to draw the completions best first, without replacement.
    u_N = random_u()[:5]
    a_N = torch.tensor([0.1, 3.0, -2.0, 0.4, 1.0]).double()
    best_first = torch.argsort(a_N, descending=True)
    worth = u_N[best_first].exp()
    drawn = math.prod(float(worth[k] / worth[k:].sum()) for k in range(5))
    loss = plackett_luce_loss(u_N, a_N, Groups.from_ids(torch.zeros(5, dtype=torch.int64)))
    assert float(loss.value_G) == pytest.approx(-math.log(drawn) / 5, rel=1e-12)


class Ranking(torch.autograd.Function):
    """The value with the closed form as its backward, so that gradcheck compares the two."""

    @staticmethod
    def forward(ctx: Any, u_N: Tensor, a_N: Tensor, groups: Groups, name: str) -> Tensor:
        loss = RANKINGS[name](u_N, a_N, groups)
        ctx.groups, ctx.grad_N = groups, loss.grad_N
        return loss.value_G

    @staticmethod
    def backward(ctx: Any, grad_G: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.groups.spread(grad_G) * ctx.grad_N, None, None, None


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("ties", [True, False])
def test_gradcheck(name: str, ties: bool) -> None:
    groups = Groups.from_ids(torch.tensor(IDS))
    a_N = torch.tensor(TIED).double() if ties else random_u(seed=1)
    u_N = random_u().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: Ranking.apply(u, a_N, groups, name), u_N)


def test_worked_numbers() -> None:
    # A = (2, 1, 1) at u = 0. Plackett-Luce: risk sets of 3, 2, 2. Pairwise: two pairs.
    groups, u_N = Groups.from_ids(torch.tensor([0, 0, 0])), torch.zeros(3, dtype=torch.float64)
    a_N = torch.tensor([2.0, 1.0, 1.0]).double()
    ranked, paired = plackett_luce_loss(u_N, a_N, groups), pairwise_loss(u_N, a_N, groups)
    assert ranked.value_G.tolist() == pytest.approx([math.log(12.0) / 3.0])
    assert ranked.grad_N.tolist() == pytest.approx([-2.0 / 9.0, 1.0 / 9.0, 1.0 / 9.0])
    assert paired.value_G.tolist() == pytest.approx([math.log(2.0)])
    assert paired.grad_N.tolist() == pytest.approx([-0.5, 0.25, 0.25])
    soft = softmax_loss(torch.tensor([0.5, 0.25, 0.25]).double().log(), u_N - math.log(3), groups)
    assert soft.value_G.tolist() == pytest.approx([math.log(3.0)])
    assert soft.grad_N.tolist() == pytest.approx([-1.0 / 6.0, 1.0 / 12.0, 1.0 / 12.0])


def test_no_ordered_pair_is_no_loss() -> None:
    groups = Groups.from_ids(torch.tensor([0, 0, 1, 1]))
    loss = pairwise_loss(random_u()[:4], torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), groups)
    assert loss.value_G[0] == 0.0
    assert loss.value_G[1] > 0.0
    assert loss.grad_N[:2].tolist() == [0.0, 0.0]
    assert loss.grad_N[2] != 0.0


@pytest.mark.parametrize("name", RANKINGS)
def test_far_logits_stay_finite(name: str) -> None:
    groups = Groups.from_ids(torch.tensor(IDS))
    u_N = (700.0 * random_u()).clamp(-1000.0, 1000.0)
    loss = RANKINGS[name](u_N, torch.tensor(TIED).double(), groups)
    assert loss.value_G.isfinite().all()
    assert loss.grad_N.isfinite().all()
    assert groups.sum(loss.grad_N).abs().max() < 1e-14


def test_softmax_is_apo_at_alpha_one() -> None:
    # -sum q log p = KL(q || p) + H(q): the same gradient, the value off by the target's entropy.
    batch = random_batch(seed=3)
    soft = AdpoSoftmax(beta_r=0.4).weigh(batch, 0.0)
    apo = Apo(beta_r=0.4).weigh(batch, 1.0)
    difference_N = soft.columns.coefficient_N - apo.columns.coefficient_N
    assert difference_N.abs().max() < 1e-14
    entropies = [
        torch.distributions.Categorical(logits=batch.advantages_N[batch.groups.index_N == g] / 0.4)
        for g in range(3)
    ]
    mean_entropy = sum(float(q.entropy()) for q in entropies) / 3
    assert float(soft.value - apo.value) == pytest.approx(mean_entropy, rel=1e-12)
    assert torch.equal(soft.log_ratio_N, apo.log_ratio_N)


@pytest.mark.parametrize("name", ["adpo_plackett_luce", "adpo_pairwise"])
def test_rankings_read_only_the_order_of_advantages(name: str) -> None:
    batch = random_batch(seed=4)
    stretched = replace(batch, advantages_N=torch.expm1(2.0 * batch.advantages_N))
    assert torch.equal(
        AdpoRanking(name=name).weigh(batch, 0.5).columns.coefficient_N,
        AdpoRanking(name=name).weigh(stretched, 0.5).columns.coefficient_N,
    )


@pytest.mark.parametrize(
    "objective",
    [AdpoSoftmax(), AdpoRanking(name="adpo_plackett_luce"), AdpoRanking(name="adpo_pairwise")],
)
def test_no_signal_on_the_anchor_gives_nothing(objective: Any) -> None:
    for size in (2, 3, 7, 64):
        columns = objective.weigh(hand_batch([0] * size, [0.0] * size), 0.5).columns
        assert columns.coefficient_N.abs().max() <= 1e-15
    columns = replace(objective, no_signal="drop").weigh(
        hand_batch([0, 0], [0.0, 0.0], u=[1.0, -1.0]), 0.5
    )
    assert columns.columns.coefficient_N.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", [AdpoSoftmax, AdpoRanking])
@pytest.mark.parametrize(
    ("key", "value"),
    [("advantages", "median"), ("logprob_reduction", "max"), ("no_signal", "keep")],
)
def test_bad_fields_name_key_and_value(kind: type, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key} must be .*{value}"):
        kind(**{key: value})
