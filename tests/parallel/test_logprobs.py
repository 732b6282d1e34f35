"""Log-probs from hidden states against the definition in float64, on 1, 2 and 4 ranks."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo.parallel import logprob_chunks
from nemo_apo.parallel import logprobs as kernel
from nemo_apo.parallel.logprobs import MODES, linear_logprobs, usual_backend

from .ranks import run_ranks

TOKENS, HIDDEN, VOCAB = 90, 8, 37
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
# Triton's interpreter takes seconds, and its kernels do not know the mode.
WAYS = [*((mode, "torch") for mode in MODES), pytest.param("exact", "triton", marks=needs_triton)]


@dataclass
class Numbers:
    logprobs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


@dataclass(frozen=True)
class Example:
    """Hidden states, output layer (rows beyond VOCAB are padding), targets, slopes of the loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    slopes: Tensor

    def to(self, dtype: torch.dtype) -> "Example":
        return Example(self.hidden.to(dtype), self.weight.to(dtype), self.targets, self.slopes)


def example(width: int = VOCAB, scale: float = 1.0) -> Example:
    draw = torch.Generator().manual_seed(11)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    weight = scale * torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64)
    padding = torch.full((width - VOCAB, HIDDEN), 1e30, dtype=torch.float64)
    # Every token id is a target, the first and the last of each chunk and shard among them.
    targets = torch.arange(TOKENS) % VOCAB
    slopes = torch.randn(2, TOKENS, generator=draw, dtype=torch.float64)
    return Example(hidden, torch.cat([weight, padding]), targets, slopes)


def expected(case: Example, temperature: float = 1.0, entropy_slope: float = 1.0) -> Numbers:
    """By the definition, on the unpadded vocabulary, in float64."""
    hidden = case.hidden.double().clone().requires_grad_()
    weight = case.weight.double().clone().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight[:VOCAB].t() / temperature, dim=-1)
    logprobs = log_p.gather(-1, case.targets[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    (case.slopes[0] * logprobs + entropy_slope * case.slopes[1] * entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Numbers(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def computed(case: Example, entropy_slope: float | None = 1.0, **options: Any) -> Numbers:
    """By the code, with this rank's rows of the output layer."""
    width = len(case.weight) // dist.get_world_size()
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight[dist.get_rank() * width :][:width].clone().requires_grad_()
    options = {"vocab_size": VOCAB, "group": dist.group.WORLD, **options}
    if options.get("backend") == "triton":
        from nemo_apo.parallel import logprob_chunks_triton

        logprob_chunks_triton._BLOCK = 8
    logprobs, entropy = linear_logprobs(hidden, weight, case.targets, **options)
    loss = (case.slopes[0] * logprobs).sum()
    if entropy_slope is not None:
        loss = loss + (entropy_slope * case.slopes[1] * entropy).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Numbers(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def assert_equal(found: Numbers, wanted: Numbers, tolerance: float = 1e-12) -> None:
    for name in ("logprobs", "entropy", "grad_hidden", "grad_weight"):
        actual, right = getattr(found, name).double(), getattr(wanted, name)
        gap = float((actual - right).abs().max() / right.abs().max())
        assert gap <= tolerance, (name, gap)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of the vocabulary, the last one short, and several blocks of tokens."""
    monkeypatch.setattr(kernel, "CHUNK", 10)
    monkeypatch.setattr(logprob_chunks, "_CPU_ROWS", 32)


@pytest.mark.parametrize(("mode", "backend"), WAYS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_rank_follows_the_definition(mode: str, temperature: float, backend: str) -> None:
    def work() -> None:
        for case in (example(), example(scale=400.0)):
            found = computed(case, temperature=temperature, mode=mode, backend=backend)
            assert_equal(found, expected(case, temperature))

    run_ranks(1, work)


def test_gradients_pass_gradcheck() -> None:
    def work() -> None:
        case = example(VOCAB)
        hidden = case.hidden[:5].requires_grad_()
        weight = case.weight.requires_grad_()

        def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return linear_logprobs(
                hidden,
                weight,
                case.targets[:5],
                vocab_size=VOCAB - 3,
                group=dist.group.WORLD,
                temperature=1.3,
            )

        assert torch.autograd.gradcheck(both, (hidden, weight))

    run_ranks(1, work)


def test_without_a_slope_into_the_entropy_its_part_is_left_out() -> None:
    def work() -> None:
        found = computed(example(), entropy_slope=None)
        assert_equal(found, expected(example(), entropy_slope=0.0))

    run_ranks(1, work)


@pytest.mark.parametrize(
    ("world_size", "width"),
    [
        pytest.param(1, 40, id="one rank, padding"),
        pytest.param(2, 38, id="two ranks, padding in the last"),
        pytest.param(4, 60, id="four ranks, padding within the third, the last padding only"),
    ],
)
@pytest.mark.parametrize(("mode", "backend"), WAYS)
def test_shards_give_what_one_rank_gives(
    world_size: int, width: int, mode: str, backend: str
) -> None:
    case = example(width)
    wanted = expected(case)
    ranks = run_ranks(world_size, lambda: computed(case, mode=mode, backend=backend))
    whole = torch.cat([numbers.grad_weight for numbers in ranks])
    for numbers in ranks:
        found = Numbers(numbers.logprobs, numbers.entropy, numbers.grad_hidden, whole)
        assert_equal(found, wanted)
        assert (whole[VOCAB:] == 0.0).all()


def test_three_collectives_over_the_tensor_ranks() -> None:
    def work() -> list[int]:
        sizes: list[int] = []
        reduce = dist.all_reduce

        def counted(values: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(values.numel())
            return reduce(values, *args, **kwargs)

        dist.all_reduce = counted
        try:
            computed(example(38))
        finally:
            dist.all_reduce = reduce
        return sizes

    for sizes in run_ranks(2, work):
        assert sizes == [TOKENS, 3 * TOKENS, TOKENS * HIDDEN]


@pytest.mark.parametrize(("mode", "backend"), WAYS)
def test_float32_is_computed_in_float32(mode: str, backend: str) -> None:
    def work() -> None:
        case = example().to(torch.float32)
        found = computed(case, mode=mode, backend=backend)
        assert_equal(found, expected(case), tolerance=1e-6)

    run_ranks(1, work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_inputs_with_exact_logits(backend: str) -> None:
    """Only the slopes of the products are rounded to bf16, not the log-probs."""

    def work() -> None:
        case = example().to(torch.bfloat16)
        found, wanted = computed(case, mode="exact", backend=backend), expected(case)
        assert found.logprobs.dtype == found.entropy.dtype == torch.float32
        assert found.grad_hidden.dtype == found.grad_weight.dtype == torch.bfloat16
        for name in ("logprobs", "entropy"):
            gap = (getattr(found, name).double() - getattr(wanted, name)).abs().max()
            assert float(gap) < 2e-5
        for name in ("grad_hidden", "grad_weight"):
            actual, right = getattr(found, name).double(), getattr(wanted, name)
            assert float((actual - right).abs().max() / right.abs().max()) < 2e-2

    run_ranks(1, work)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("bf16", "torch"),
        ("keep_logits", "torch"),
        pytest.param("bf16", "triton", marks=needs_triton),
    ],
)
def test_bf16_logits_are_what_their_rounding_says(mode: str, backend: str) -> None:
    """Against the definition on the rounded logits, in float64."""

    def work() -> None:
        case = example().to(torch.bfloat16)
        logits = (case.hidden @ case.weight.t()).double()
        log_p = torch.log_softmax(logits, dim=-1)
        found = computed(case, mode=mode, backend=backend)
        wanted = log_p.gather(-1, case.targets[:, None]).squeeze(-1)
        assert float((found.logprobs.double() - wanted).abs().max()) < 1e-5
        assert_equal(found, expected(case), tolerance=5e-2)

    run_ranks(1, work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_keep_the_graph_connected(backend: str) -> None:
    def work() -> None:
        case = example()
        none = Example(case.hidden[:0], case.weight, case.targets[:0], case.slopes[:, :0])
        found = computed(none, backend=backend)
        assert found.logprobs.shape == (0,)
        assert (found.grad_weight == 0.0).all()

    run_ranks(1, work)


def test_hidden_states_that_are_not_contiguous() -> None:
    def work() -> None:
        case = example()
        crossed = Example(case.hidden.t().contiguous().t(), case.weight, case.targets, case.slopes)
        assert not crossed.hidden.is_contiguous()
        assert_equal(computed(crossed), expected(case))

    run_ranks(1, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_is_added_to_main_grad(dtype: torch.dtype) -> None:
    """Twice, as of two micro-batches: in float32, and autograd gets none."""

    def work() -> None:
        case = example(40).to(dtype)
        weight = case.weight.clone().requires_grad_()
        weight.main_grad = torch.full_like(weight, 0.5, dtype=torch.float32)
        hidden = case.hidden.clone().requires_grad_()
        for _ in range(2):
            logprobs, _ = linear_logprobs(
                hidden,
                weight,
                case.targets,
                vocab_size=VOCAB,
                group=dist.group.WORLD,
                into_main_grad=True,
            )
            (case.slopes[0] * logprobs).sum().backward()
        wanted = expected(case, entropy_slope=0.0).grad_weight
        gap = (weight.main_grad.double() - 0.5 - 2 * wanted).abs().max() / wanted.abs().max()
        assert float(gap) < (1e-6 if dtype == torch.float32 else 2e-2)
        assert (weight.main_grad[VOCAB:] == 0.5).all()
        assert weight.grad is None
        assert weight.grad_added_to_main_grad

    run_ranks(1, work)


def test_the_gradient_of_the_hidden_states_can_be_left_to_be_summed() -> None:
    case = example(38)
    ranks = run_ranks(2, lambda: computed(case, sums_hidden_grad=False))
    total = sum(numbers.grad_hidden for numbers in ranks)
    torch.testing.assert_close(total, expected(case).grad_hidden, rtol=0.0, atol=1e-12)
    assert not torch.allclose(ranks[0].grad_hidden, total)


def test_a_cpu_takes_the_torch_backend() -> None:
    assert usual_backend(torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("option", "choices"), [("mode", "exact, bf16, keep_logits"), ("backend", "torch, triton")]
)
def test_an_unknown_choice_is_refused(option: str, choices: str) -> None:
    def work() -> None:
        with pytest.raises(ValueError, match=f"{option} must be one of {choices}, got 'fast'"):
            computed(example(), **{option: "fast"})

    run_ranks(1, work)
