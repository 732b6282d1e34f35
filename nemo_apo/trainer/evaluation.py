"""Held-out evaluation: greedy accuracy and reward, and pass@k."""

import contextlib
from dataclasses import dataclass

import torch

from nemo_apo.config import Config
from nemo_apo.grading import Grading
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete, grade


@dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1] (the reward in its own unit), over held-out prompts.

    Attributes:
        accuracy: greedy completions that are the best answer.
        reward: mean reward of greedy completions.
        pass_at_k: prompts with at least one best answer among k samples.
    """

    accuracy: float
    reward: float
    pass_at_k: float


def evaluate(policy: Policy, config: Config, task: Task) -> Evaluation:
    """Evaluate the current weights; the same result on all ranks, the same prompts every time."""
    prompts = task.test_prompts(config.evaluation.prompts)
    greedy = complete(policy, task, config.rollout, prompts, None)
    solved = [task.solved(prompt, greedy.row(row)) for row, prompt in enumerate(prompts)]
    with contextlib.closing(Grading(config.grading, task)) as grading:
        rewards_N = grade(policy.layout, grading, task, prompts, greedy).rewards_N
    return Evaluation(
        accuracy=sum(solved) / len(solved),
        reward=float(torch.nanmean(rewards_N)),
        pass_at_k=_pass_at_k(policy, config, task, prompts[: config.evaluation.pass_prompts]),
    )


def _pass_at_k(policy: Policy, config: Config, task: Task, prompts: list[Prompt]) -> float:
    k = config.evaluation.pass_k
    repeated = [prompt for prompt in prompts for _ in range(k)]
    draws = uniforms(config.run.seed, "pass@k", len(repeated), task.max_response_length)
    sampled = complete(policy, task, config.rollout, repeated, draws)
    solved = [task.solved(prompt, sampled.row(row)) for row, prompt in enumerate(repeated)]
    passed = [any(solved[i * k : (i + 1) * k]) for i in range(len(prompts))]
    return sum(passed) / len(passed)
