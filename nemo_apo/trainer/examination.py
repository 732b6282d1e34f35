"""Held-out prompts completed and judged: greedily, and by several samples each.

What is right is what the task calls solved where it grades itself (``grading.grader=task``), else
a grade of at least 1; a grade that failed is wrong. Samples are a function of the run's seed, and
training draws from other streams: an examination changes nothing in it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_apo.config import Config
from nemo_apo.grading import Grading
from nemo_apo.grading.settings import TASK_GRADER
from nemo_apo.grading.votes import vote
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.interruption import StopCheck
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete, grade


@dataclass(frozen=True)
class Answers:
    """Completions and what was found of each; sequences of one entry per completion.

    Attributes:
        prompts: the prompts, each repeated for all its completions.
        completions: what the policy said.
        right: whether it is the right answer.
        rewards: by the grader alone, without the terms of shaping; NaN where it failed; empty
            where nothing had to be graded.
        reasons: why a grade failed, a key of ``nemo_apo.grading.REASONS``, or "".
        votes: its normalised answer, None where it gives none.
    """

    prompts: Sequence[Prompt]
    completions: Completions
    right: Sequence[bool]
    rewards: Sequence[float]
    reasons: Sequence[str]
    votes: Sequence[str | None]


@dataclass(frozen=True)
class Examination:
    """All that an evaluation saw, the same on all ranks.

    Attributes:
        greedy: one completion of every prompt.
        sampled: ``per_prompt`` samples of each of the first prompts, those of one prompt together.
        per_prompt: samples per prompt.
        k: of pass@k and maj@k.
    """

    greedy: Answers
    sampled: Answers
    per_prompt: int
    k: int


def examine(
    policy: Policy, config: Config, task: Task, stop: StopCheck | None = None
) -> Examination:
    """Complete the held-out prompts with the current weights and judge the completions.

    Args:
        policy: whose weights are evaluated.
        config: sections ``evaluation``, ``grading`` and ``rollout``, and the seed.
        task: gives the prompts.
        stop: asked between batches; None is never.

    Raises:
        GradingBroken: on all ranks, if one of them has no worker.
        StoppedEarly: on all ranks, if ``stop`` asks for it.
    """
    settings = config.evaluation
    per_prompt = settings.pass_samples or settings.pass_k
    prompts = task.test_prompts(settings.prompts)
    repeated = [prompt for prompt in prompts[: settings.pass_prompts] for _ in range(per_prompt)]
    draws = uniforms(config.run.seed, "pass@k", len(repeated), task.max_response_length)
    with contextlib.closing(Grading(config.grading, task)) as grading:
        said = complete(policy, task, config.rollout, prompts, None, stop)
        greedy = _judged(policy, config, grading, prompts, said, needs_rewards=True)
        said = complete(policy, task, config.rollout, repeated, draws, stop)
        sampled = _judged(policy, config, grading, repeated, said, needs_rewards=False)
    return Examination(greedy, sampled, per_prompt, settings.pass_k)


def _judged(
    policy: Policy,
    config: Config,
    grading: Grading,
    prompts: Sequence[Prompt],
    completions: Completions,
    needs_rewards: bool,
) -> Answers:
    """Whether completions are right, and by ``needs_rewards`` their rewards in any case."""
    task, by_task = config.task, config.grading.grader == TASK_GRADER
    rewards: list[float] = []
    reasons = [""] * len(prompts)
    if needs_rewards or not by_task:
        graded = grade(policy.layout, grading, task, prompts, completions)
        rewards, reasons = graded.correct_N.tolist(), list(graded.reasons)
    if by_task:
        right = [task.solved(prompt, completions.row(row)) for row, prompt in enumerate(prompts)]
    else:
        right = [reward >= 1.0 for reward in rewards]  # NaN is not
    votes = [
        vote(task.text(completions.row(row)), finished, config.grading.grader)
        for row, finished in enumerate(completions.finished_N.tolist())
    ]
    return Answers(prompts, completions, right, rewards, reasons, votes)
