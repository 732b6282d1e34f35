"""``nemo-apo bench logprobs``: speed, memory and error of the ways to log-probs, side by side."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from nemo_apo.bench.example import Example, draw, float64_logprob_sum
from nemo_apo.bench.gemms import multiply
from nemo_apo.bench.groups import group_of_one
from nemo_apo.bench.memory import peak_mib
from nemo_apo.bench.timing import Times, interleaved
from nemo_apo.bench.variants import VARIANTS, Setting

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GEMMS = "gemm_8thv"
# The error of a sum is that over so many tokens at most.
ERROR_TOKENS = 1024


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        tokens: how many, each a measurement of its own.
        hidden, vocab: sizes.
        dtypes: of hidden states and weight, names of ``DTYPES``.
        modes: of this package's kernel.
        variants: names of ``VARIANTS``; one that cannot run here is left out.
        repeats: of every measurement.
        threads: of the CPU.
        device: "cpu" or "cuda".
    """

    tokens: tuple[int, ...]
    hidden: int
    vocab: int
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    variants: tuple[str, ...]
    repeats: int
    threads: int
    device: str


@dataclass(frozen=True)
class Row:
    """A variant in one setting.

    Attributes:
        time_s: median seconds of forward and backward.
        gemm_ratio: median of the time over that of the bare products next to it.
        peak_mib: highest memory above the inputs, the two gradients included; None where the
            system does not tell.
        sum_error_nats: error of the sum of the log-probs of the first tokens against float64;
            None for the bare products.
        mode: of this package's kernel; None for the other variants.
    """

    variant: str
    tokens: int
    hidden: int
    vocab: int
    dtype: str
    threads: int
    time_s: float
    gemm_ratio: float
    peak_mib: float | None
    sum_error_nats: float | None
    entropy: bool
    mode: str | None


@dataclass
class Result:
    """Rows, and why a variant has none."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Case:
    """A variant in a setting, ready to run."""

    variant: str
    setting: Setting

    @property
    def name(self) -> str:
        parts = [self.variant, self.setting.mode, "entropy" if self.setting.entropy else None]
        return " ".join(filter(None, parts))

    def run(self, example: Example) -> float:
        """Forward and backward; the sum of the log-probs."""
        logprobs = VARIANTS[self.variant].run(example, self.setting)
        return float(logprobs.double().sum())


def run(request: Request, say: Callable[[str], None]) -> Result:
    """Measure everything; ``say`` is told what is being measured."""
    torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    result = Result()
    with group_of_one(device) as group:
        for dtype in request.dtypes:
            for tokens in request.tokens:
                # What torch.compile made for other sizes would be slower for these.
                torch.compiler.reset()
                example = draw(tokens, request.hidden, request.vocab, DTYPES[dtype], device)
                _measure(request, example, dtype, list(_cases(request, dtype, group)), result, say)
    return result


def _cases(request: Request, dtype: str, group: dist.ProcessGroup) -> Iterator[_Case]:
    device = torch.device(request.device)
    for name in request.variants:
        variant = VARIANTS[name]
        if not variant.available(device):
            continue
        for mode in _modes(request, dtype) if variant.has_modes else [None]:
            for entropy in (False, True) if variant.has_entropy else (False,):
                yield _Case(name, Setting(group, mode, entropy))


def _modes(request: Request, dtype: str) -> list[str]:
    """The modes that differ: with float32 inputs, "bf16" and "exact" are the same."""
    if dtype != "fp32":
        return list(request.modes)
    return list(dict.fromkeys("exact" if mode == "bf16" else mode for mode in request.modes))


def _measure(
    request: Request,
    example: Example,
    dtype: str,
    cases: list[_Case],
    result: Result,
    say: Callable[[str], None],
) -> None:
    """Rows of all cases with one example."""
    title = f"{example.tokens} tokens, {dtype}"
    device = example.hidden_TH.device
    warm = _warm_up(example, cases, title, result, say)
    say(f"{title}: {request.repeats} repeats")
    works = {case.name: partial(case.run, example) for case in warm.cases}
    times, bare = interleaved(works, partial(multiply, example), request.repeats, device)
    say(f"{title}: errors against float64")
    errors = _errors(example, warm)

    def row(name: str, timing: Times, case: _Case | None) -> Row:
        return Row(
            variant=case.variant if case else GEMMS,
            tokens=example.tokens,
            hidden=request.hidden,
            vocab=request.vocab,
            dtype=dtype,
            threads=request.threads,
            time_s=timing.time_s,
            gemm_ratio=timing.ratio,
            peak_mib=warm.peaks[name],
            sum_error_nats=errors.get(name),
            entropy=case.setting.entropy if case else False,
            mode=case.setting.mode if case else None,
        )

    result.rows.append(row(GEMMS, bare, None))
    result.rows += [row(case.name, times[case.name], case) for case in warm.cases]


@dataclass
class _Warm:
    """Cases that ran once, with their sums of log-probs and, as of the products, their peaks."""

    cases: list[_Case] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)


def _warm_up(
    example: Example,
    cases: list[_Case],
    title: str,
    result: Result,
    say: Callable[[str], None],
) -> _Warm:
    """Run everything once to warm up and once for its peak memory; note what fails."""
    device, warm = example.hidden_TH.device, _Warm()
    say(f"{title}: warm-up and peak memory: {GEMMS}")
    multiply(example)
    warm.peaks[GEMMS] = peak_mib(partial(multiply, example), device)
    for case in cases:
        say(f"{title}: warm-up and peak memory: {case.name}")
        try:
            warm.sums[case.name] = case.run(example)
        except (ImportError, RuntimeError, TypeError) as error:
            # No compiler for torch.compile, too little memory, a package too old or too new.
            result.left_out[f"{case.name}, {title}"] = _first_line(error)
            continue
        warm.cases.append(case)
        warm.peaks[case.name] = peak_mib(partial(case.run, example), device)
    return warm


def _errors(example: Example, warm: _Warm) -> dict[str, float]:
    """Error of the sum over the first tokens, by case."""
    few, sums = example, warm.sums
    if example.tokens > ERROR_TOKENS:
        torch.compiler.reset()
        few = example.first(ERROR_TOKENS)
        sums = {case.name: case.run(few) for case in warm.cases}
    expected = float64_logprob_sum(few)
    return {name: abs(total - expected) for name, total in sums.items()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
