"""The figures of a held-out evaluation, each a mean over prompts with its standard error."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.core.estimators import majority, pass_at_k, standard_error
from nemo_apo.tasks import Task
from nemo_apo.trainer.examination import Examination, examine
from nemo_apo.trainer.policy import Policy


@dataclass(frozen=True)
class Figure:
    """A mean over prompts, its standard error (NaN for fewer than two) and their number."""

    value: float
    error: float
    prompts: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """The mean of the values that are not NaN; NaN itself if there are none."""
        known = [value for value in values if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        return cls(mean, standard_error(known), len(known))


@dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1], the reward in its own unit, lengths in tokens; over held-out prompts.

    Attributes:
        accuracy: greedy completions that are right.
        reward: of greedy completions whose grade did not fail.
        response_length, truncated: of greedy completions; those cut at the length limit.
        pass_at: by k, the probability that one of k samples of a prompt is right.
        maj_at_k: prompts for which the most frequent answer of the first k samples is right.
        sampled_length, sampled_truncated: of the samples.
        failures: failed grades by reason, greedy and sampled.
        k: ``evaluation.pass_k``, a key of ``pass_at`` like 1.
    """

    accuracy: Figure
    reward: Figure
    response_length: Figure
    truncated: Figure
    pass_at: dict[int, Figure]
    maj_at_k: Figure
    sampled_length: Figure
    sampled_truncated: Figure
    failures: dict[str, int]
    k: int

    def metrics(self) -> dict[str, float]:
        """The figures by the names of ``nemo_apo.record``."""
        return {
            record.EVAL_ACCURACY: self.accuracy.value,
            record.EVAL_ACCURACY_ERROR: self.accuracy.error,
            record.EVAL_REWARD: self.reward.value,
            record.EVAL_PASS_AT_K: self.pass_at[self.k].value,
            record.EVAL_MAJ_AT_K: self.maj_at_k.value,
            record.EVAL_SAMPLED_ACCURACY: self.pass_at[1].value,
            record.EVAL_RESPONSE_LENGTH: self.response_length.value,
            record.EVAL_TRUNCATED_SHARE: self.truncated.value,
            record.EVAL_FAILED_GRADES: float(sum(self.failures.values())),
        }


def evaluate(policy: Policy, config: Config, task: Task) -> Evaluation:
    """Evaluate the current weights; the same result on all ranks, the same prompts every time."""
    return figures(examine(policy, config, task))


def figures(seen: Examination) -> Evaluation:
    """The figures of an examination."""
    greedy, said = seen.greedy, seen.sampled.completions
    reasons = filter(None, [*greedy.reasons, *seen.sampled.reasons])
    return Evaluation(
        accuracy=Figure.of([float(right) for right in greedy.right]),
        reward=Figure.of(greedy.rewards),
        response_length=Figure.of(greedy.completions.lengths_N.double().tolist()),
        truncated=Figure.of((~greedy.completions.finished_N).double().tolist()),
        pass_at={k: _pass_at(seen, k) for k in _ks(seen.per_prompt, seen.k)},
        maj_at_k=_by_prompt(seen, lambda rows: _majority_is_right(seen, rows)),
        sampled_length=_by_prompt(seen, lambda rows: _mean(said.lengths_N[rows])),
        sampled_truncated=_by_prompt(seen, lambda rows: _mean(~said.finished_N[rows])),
        failures=dict(Counter(reasons)),
        k=seen.k,
    )


def _ks(per_prompt: int, k: int) -> list[int]:
    """For which k pass@k is told: powers of two, what was asked for, and all samples."""
    powers = {2**power for power in range(per_prompt.bit_length())}
    return sorted(powers | {k, per_prompt})


def _pass_at(seen: Examination, k: int) -> Figure:
    right = seen.sampled.right
    return _by_prompt(seen, lambda rows: pass_at_k(seen.per_prompt, sum(right[rows]), k))


def _majority_is_right(seen: Examination, rows: slice) -> float:
    """Whether the first k samples of a prompt elect a right answer: that of its first voter."""
    elected = majority(seen.sampled.votes[rows][: seen.k])
    return 0.0 if elected is None else float(seen.sampled.right[rows][elected])


def _by_prompt(seen: Examination, value_of: Callable[[slice], float]) -> Figure:
    """A figure of one value per sampled prompt, computed from the rows of its samples."""
    starts = range(0, len(seen.sampled.prompts), seen.per_prompt)
    return Figure.of([value_of(slice(start, start + seen.per_prompt)) for start in starts])


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
