"""Sampling and grading over all ranks: every rank completes its share, all get everything."""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import RolloutConfig
from nemo_apo.grading import REASONS, Grade, Grading, GradingBroken, Sample, Shaping
from nemo_apo.grading.outcome import reason_of
from nemo_apo.parallel.gather import all_gather_objects, all_gather_rows, all_true
from nemo_apo.parallel.layout import Layout
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.interruption import NeverStop, StopCheck, check_stop
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Graded:
    """The grades of a list of completions, the same on all ranks.

    Attributes:
        correct_N: what the grader gave, float64; NaN where the grade failed.
        rewards_N: the same with the terms of shaping, by their weights; NaN where the grade failed.
        terms: each term of shaping that is in use, by name, [N] float64 in [0, 1].
        failures: number of failed grades by reason, a key of ``nemo_apo.grading.REASONS``.
        reasons: why the grade of each failed, such a key, or "".
    """

    correct_N: Tensor
    rewards_N: Tensor
    terms: dict[str, Tensor]
    failures: dict[str, int]
    reasons: tuple[str, ...]

    def means(self) -> dict[str, float]:
        """Means over the completions, by the names of ``nemo_apo.record``; NaN if all failed."""
        means = {record.SHAPING_TERMS[name]: float(t_N.mean()) for name, t_N in self.terms.items()}
        return {record.REWARD_CORRECT: float(self.correct_N.nanmean()), **means}


def complete(
    policy: Policy,
    task: Task,
    rollout: RolloutConfig,
    prompts: Sequence[Prompt],
    uniforms_NR: Tensor | None,
    stop: StopCheck | None = None,
) -> Completions:
    """Complete every prompt with the policy's current weights; the same result on all ranks.

    Args:
        policy: whose engine takes over its weights first.
        task: gives token ids and lengths.
        rollout: temperature and batch size.
        prompts: one per completion wanted.
        uniforms_NR: see ``RolloutEngine.generate``; None decodes greedily.
        stop: asked between batches; None is never.

    Raises:
        StoppedEarly: on all ranks, if ``stop`` asks for it.
    """
    engine = policy.engine
    rows = _share(policy.layout, engine.ranks_per_copy, len(prompts))
    with policy.offloaded() if rollout.offload else contextlib.nullcontext():
        engine.wake()
        try:
            engine.refit()
            part = engine.generate(
                [prompts[row] for row in rows],
                None if uniforms_NR is None else uniforms_NR[rows],
                Sampling.of(task, policy.vocab_size, rollout.temperature, rollout.micro_batch_size),
                between=lambda: check_stop(stop or NeverStop()),
            )
        finally:
            engine.sleep()

    def gathered(values_n: Tensor) -> Tensor:
        values_N = of_first_ranks(all_gather_rows(values_n), len(rows), engine.ranks_per_copy)
        return values_N[: len(prompts)].cpu()

    return Completions(
        tokens_NR=gathered(part.tokens_NR),
        lengths_N=gathered(part.lengths_N),
        finished_N=gathered(part.finished_N.to(torch.uint8)).bool(),
        logprobs_NR=gathered(part.logprobs_NR),
        logprob_sums_N=gathered(part.logprob_sums_N),
    )


def of_first_ranks(values_N: Tensor, rows: int, ranks_per_copy: int) -> Tensor:
    """Of the rows of all ranks, ``rows`` of each, those of the first rank of each copy."""
    by_copy = values_N.unflatten(0, (-1, ranks_per_copy, rows))
    return by_copy[:, 0].flatten(0, 1)


def grade(
    layout: Layout,
    grading: Grading,
    task: Task,
    prompts: Sequence[Prompt],
    completions: Completions,
    shaping: Shaping | None = None,
) -> Graded:
    """Grade every completion; the first failure of a kind is logged on the first rank.

    Every rank grades its share and all get everything: each completion is graded once, so ranks
    agree even on a grader that does not always answer the same.

    Args:
        layout: of the ranks.
        grading: grader and workers.
        task: gives texts, references and the length limit.
        prompts: one per completion.
        completions: to grade.
        shaping: terms that are added to the grades; None leaves the grades as they are.

    Raises:
        GradingBroken: on all ranks, if one of them has no worker.
    """
    per_rank = _per_rank(layout, len(prompts))
    mine = range(layout.rank * per_rank, min((layout.rank + 1) * per_rank, len(prompts)))
    samples = [sample_of(task, prompts[row], completions.row(row)) for row in mine]
    grades = _grade_on_all_ranks(layout, grading, samples)
    weights = {} if shaping is None else shaping.weights
    rows = [
        [grade.value, float(grade.code), *_terms(shaping, sample, task)]
        for grade, sample in zip(grades, samples, strict=True)
    ]
    rows += [[math.nan, 0.0, *(0.0 for _ in weights)]] * (per_rank - len(rows))
    part_NC = torch.tensor(rows, dtype=torch.float64, device=layout.device)
    correct_N, codes_N, *term_Ns = all_gather_rows(part_NC)[: len(prompts)].cpu().unbind(dim=1)
    reasons = [reason_of(int(code)) for code in codes_N.tolist()]
    _tell_first(layout, grading, reasons, grades)
    rewards_N = correct_N.clone()
    for weight, term_N in zip(weights.values(), term_Ns, strict=True):
        rewards_N += weight * term_N
    return Graded(
        correct_N=correct_N,
        rewards_N=rewards_N,
        terms=dict(zip(weights, term_Ns, strict=True)),
        failures=dict(Counter(filter(None, reasons))),
        reasons=tuple(reasons),
    )


def _terms(shaping: Shaping | None, sample: Sample, task: Task) -> list[float]:
    """The terms of a completion, in the order of their weights."""
    if shaping is None:
        return []
    length = len(sample.completion_tokens)
    return list(shaping.terms(sample.completion, length, task.max_response_length).values())


def sample_of(task: Task, prompt: Prompt, completion: list[int]) -> Sample:
    """A completion as a grader is given it, by text and by token ids."""
    return Sample(
        prompt.text,
        prompt.tokens,
        task.text(completion),
        tuple(completion),
        task.reference(prompt),
    )


def _grade_on_all_ranks(layout: Layout, grading: Grading, samples: list[Sample]) -> list[Grade]:
    """This rank's grades; if workers are broken on one rank, all ranks raise."""
    broken, grades = "", []
    try:
        grades = grading.grade(samples)
    except GradingBroken as error:
        broken = f"rank {layout.rank}: {error}"
    if all_true(not broken, layout.device):
        return grades
    raise GradingBroken("; ".join(filter(None, all_gather_objects(broken))))


def _tell_first(layout: Layout, grading: Grading, reasons: list[str], grades: list[Grade]) -> None:
    """Log a reason the first time that it comes up, with the sample's index and the place."""
    new = grading.first_time([reason for reason in reasons if reason])
    if not new:
        return
    details = [detail for part in all_gather_objects(_details(grades)) for detail in part]
    if layout.rank == 0:
        for reason in new:
            row = reasons.index(reason)
            where = f" ({details[row]})" if details[row] else ""
            _LOG.warning("completion %d got no grade: %s%s", row, REASONS[reason], where)


def _details(grades: list[Grade]) -> list[str]:
    return [grade.detail for grade in grades]


def _per_rank(layout: Layout, count: int) -> int:
    return -(-count // layout.world_size)


def _share(layout: Layout, ranks_per_copy: int, count: int) -> list[int]:
    """Rows of this rank's copy; those past the end repeat the last one and are cut off later."""
    copies, copy = layout.world_size // ranks_per_copy, layout.rank // ranks_per_copy
    per_copy = -(-count // copies)
    return [min(copy * per_copy + i, count - 1) for i in range(per_copy)]
