"""D_alpha and its gradient against the textbook formula in 120-digit arithmetic."""

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

from nemo_apo.core.divergence import alpha_divergence, alpha_divergence_grad, log_ratio
from nemo_apo.core.groups import Groups

ALPHAS = (0.0, 1e-12, 1e-6, 1e-3, 0.1, 0.35, 0.5, 0.6, 0.9, 1 - 1e-6, 1 - 1e-12, 1.0)

Pair = tuple[list[float], list[float]]


def exact_log_softmax(logits: list[mpf]) -> list[mpf]:
    top = max(logits)
    norm = top + mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in logits))
    return [x - norm for x in logits]


def exact_value(log_q: list[mpf], u: list[mpf], alpha: float) -> mpf:
    """Csiszar's formula as written, a Kullback-Leibler divergence at either end."""
    a, pairs = mpf(alpha), list(zip(log_q, exact_log_softmax(u), strict=True))
    if a == 0:
        return mpmath.fsum(mpmath.exp(p) * (p - q) for q, p in pairs)
    if a == 1:
        return mpmath.fsum(mpmath.exp(q) * (q - p) for q, p in pairs)
    overlap = mpmath.fsum(mpmath.exp(a * q + (1 - a) * p) for q, p in pairs)
    return (1 - overlap) / (a * (1 - a))


def exact(target: list[float], u: list[float], alpha: float) -> tuple[float, list[float]]:
    """The value and its central differences in u, whose error is of order 1e-60."""
    with mp.workdps(120):
        h = mpf(10) ** -30
        log_q = exact_log_softmax([mpf(x) for x in target])
        at = [mpf(x) for x in u]
        slopes = []
        for i in range(len(at)):
            up, down = list(at), list(at)
            up[i] += h
            down[i] -= h
            rise = exact_value(log_q, up, alpha) - exact_value(log_q, down, alpha)
            slopes.append(float(rise / (2 * h)))
        return float(exact_value(log_q, at, alpha)), slopes


def far_pairs() -> list[Pair]:
    """Random groups from nearly flat to far beyond what exp can hold."""
    random = torch.Generator().manual_seed(1)
    pairs: list[Pair] = [
        ([0.0, 0.0], [1000.0, -1000.0]),
        ([1000.0, -1000.0, 0.0], [-1000.0, 1000.0, 0.0]),
        ([500.0, -500.0], [0.0, 0.0]),
    ]
    for size, spread in ((2, 0.1), (5, 1.0), (4, 3.0), (6, 30.0), (3, 300.0), (5, 1000.0)):
        draw = torch.randn(2, size, generator=random, dtype=torch.float64)
        bounded = (spread * draw).clamp(-1000.0, 1000.0)
        pairs += [(bounded[0].tolist(), bounded[1].tolist())]
        pairs += [((0.3 * draw[0]).tolist(), bounded[1].tolist())]
    return pairs


def near_pairs() -> list[Pair]:
    """q = p to 1e-6, where the formula as written has no digit left in float64."""
    random = torch.Generator().manual_seed(2)
    draw = torch.randn(4, 2, 5, generator=random, dtype=torch.float64)
    return [((v + 1e-6 * w).tolist(), v.tolist()) for v, w in draw]


def flat(pairs: list[Pair]) -> tuple[Tensor, Tensor, Groups]:
    """log q, log p and groups of all pairs, ragged in one batch."""
    sizes = [len(u) for _, u in pairs]
    ids = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(sizes))
    groups = Groups.from_ids(ids)
    v_N = torch.tensor([x for v, _ in pairs for x in v], dtype=torch.float64)
    u_N = torch.tensor([x for _, u in pairs for x in u], dtype=torch.float64)
    return groups.log_softmax(v_N), groups.log_softmax(u_N), groups


@pytest.mark.parametrize("alpha", ALPHAS)
def test_value_and_gradient_against_exact_arithmetic(alpha: float) -> None:
    pairs = far_pairs() + near_pairs()
    log_q_N, log_p_N, groups = flat(pairs)
    value_G = alpha_divergence(log_q_N, log_p_N, groups, alpha)
    grad_N = alpha_divergence_grad(log_q_N, log_p_N, groups, alpha)
    assert value_G.isfinite().all()
    assert grad_N.isfinite().all()
    for i, (target, u) in enumerate(pairs):
        value, slopes = exact(target, u, alpha)
        grad = grad_N[groups.index_N == i]
        scale = max(1.0, max(abs(s) for s in slopes))
        assert abs(float(value_G[i]) - value) <= 1e-12 * max(1.0, value)
        assert (grad - torch.tensor(slopes, dtype=torch.float64)).abs().max() <= 1e-12 * scale
        assert abs(float(grad.sum())) <= 1e-12 * scale


@pytest.mark.parametrize("alpha", ALPHAS)
def test_relative_accuracy_next_to_the_target(alpha: float) -> None:
    # Here D is about 1e-12, below the absolute bound of the test above. float64 log-probs carry
    # 1e-16 each, so 1e-10 of the gradient and 1e-4 of the value is what can be asked.
    pairs = near_pairs()
    log_q_N, log_p_N, groups = flat(pairs)
    value_G = alpha_divergence(log_q_N, log_p_N, groups, alpha)
    grad_N = alpha_divergence_grad(log_q_N, log_p_N, groups, alpha)
    for i, (target, u) in enumerate(pairs):
        value, slopes = exact(target, u, alpha)
        grad = grad_N[groups.index_N == i]
        largest = max(abs(s) for s in slopes)
        assert (grad - torch.tensor(slopes, dtype=torch.float64)).abs().max() <= 1e-8 * largest
        assert abs(float(value_G[i]) - value) <= 1e-2 * value


@pytest.mark.parametrize("alpha", ALPHAS)
def test_exactly_zero_on_the_target(alpha: float) -> None:
    log_p_N, _, groups = flat([(u, u) for _, u in far_pairs()])
    assert torch.equal(
        alpha_divergence(log_p_N, log_p_N, groups, alpha).abs(),
        torch.zeros(groups.count, dtype=torch.float64),
    )
    assert not alpha_divergence_grad(log_p_N, log_p_N, groups, alpha).any()


class Divergence(torch.autograd.Function):
    """The value with the closed form as its backward, so that gradcheck compares the two."""

    @staticmethod
    def forward(ctx, u_N: Tensor, log_q_N: Tensor, groups: Groups, alpha: float) -> Tensor:
        log_p_N = groups.log_softmax(u_N)
        ctx.groups, ctx.grad_N = groups, alpha_divergence_grad(log_q_N, log_p_N, groups, alpha)
        return alpha_divergence(log_q_N, log_p_N, groups, alpha)

    @staticmethod
    def backward(ctx, grad_G: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.groups.spread(grad_G) * ctx.grad_N, None, None, None


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.35, 0.5, 0.9, 1.0])
def test_gradcheck(alpha: float) -> None:
    random = torch.Generator().manual_seed(3)
    groups = Groups.from_ids(torch.tensor([4, 1, 4, 1, 1, 4, 9, 9]))
    log_q_N = groups.log_softmax(torch.randn(8, generator=random, dtype=torch.float64))
    u_N = torch.randn(8, generator=random, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: Divergence.apply(u, log_q_N, groups, alpha), u_N)


def test_worked_numbers() -> None:
    # q = (0.8, 0.2), p = (0.5, 0.5): by hand, KL(p||q) = log 1.25, and at alpha = 1/2
    # D = 4 (1 - sqrt 0.4 - sqrt 0.1), dD/du = -/+ (sqrt 0.4 - sqrt 0.1).
    groups = Groups.from_ids(torch.tensor([0, 0]))
    log_q_N = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    log_p_N = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    cases = (
        (0.0, 0.22314355131420976, -0.34657359027997264),
        (0.5, 0.2052668077979448, -0.3162277660168379),
        (1.0, 0.19274475702175747, -0.3),
    )
    for alpha, value, slope in cases:
        grad_N = alpha_divergence_grad(log_q_N, log_p_N, groups, alpha)
        assert float(alpha_divergence(log_q_N, log_p_N, groups, alpha)) == pytest.approx(value)
        assert grad_N.tolist() == pytest.approx([slope, -slope])


def test_ratio_clip_bounds_the_log_ratio_inside_phi() -> None:
    log_q_N, log_p_N, groups = flat([([30.0, 0.0, 0.0], [0.0, 1.0, 2.0])])
    wide = alpha_divergence_grad(log_q_N, log_p_N, groups, 0.5, ratio_clip=1e3)
    assert torch.equal(wide, alpha_divergence_grad(log_q_N, log_p_N, groups, 0.5))
    assert log_ratio(log_q_N, log_p_N, 2.0).abs().max() == 2.0

    p = log_p_N.exp().tolist()
    d = [
        max(-2.0, min(2.0, q - r)) for q, r in zip(log_q_N.tolist(), log_p_N.tolist(), strict=True)
    ]
    t = [w * (mpmath.exp(0.5 * x) - 1) / 0.5 for w, x in zip(p, d, strict=True)]
    expected = [float(w * sum(t) - x) for w, x in zip(p, t, strict=True)]
    clipped = alpha_divergence_grad(log_q_N, log_p_N, groups, 0.5, ratio_clip=2.0)
    assert clipped.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [-1e-9, 1.0000001, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha: float) -> None:
    groups = Groups.from_ids(torch.tensor([0, 0]))
    log_p_N = torch.full((2,), 0.5, dtype=torch.float64).log()
    for function in (alpha_divergence, alpha_divergence_grad):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got"):
            function(log_p_N, log_p_N, groups, alpha)
