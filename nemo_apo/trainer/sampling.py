"""Sampling and grading over all ranks: every rank completes its share, all get everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_apo.config import RolloutConfig
from nemo_apo.parallel.gather import all_gather_rows
from nemo_apo.parallel.layout import Layout
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.interruption import NeverStop, StopCheck, check_stop
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import generate


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
        policy: whose sampler is refitted first.
        task: gives token ids and lengths.
        rollout: temperature and batch size.
        prompts: one per completion wanted.
        uniforms_NR: see ``generate``; None decodes greedily.
        stop: asked between batches; None is never.

    Raises:
        StoppedEarly: on all ranks, if ``stop`` asks for it.
    """
    model = policy.refit_sampler()
    rows = _share(policy.layout, len(prompts))
    part = generate(
        model,
        [prompts[row] for row in rows],
        None if uniforms_NR is None else uniforms_NR[rows],
        vocab_size=task.vocab_size,
        end_id=task.end_id,
        pad_id=task.pad_id,
        max_response_length=task.max_response_length,
        temperature=rollout.temperature,
        micro_batch_size=rollout.micro_batch_size,
        between=lambda: check_stop(stop or NeverStop()),
    )

    def gathered(values: Tensor) -> Tensor:
        return all_gather_rows(values)[: len(prompts)].cpu()

    return Completions(
        tokens_NR=gathered(part.tokens_NR),
        lengths_N=gathered(part.lengths_N),
        finished_N=gathered(part.finished_N.to(torch.uint8)).bool(),
        logprob_sums_N=gathered(part.logprob_sums_N),
    )


def grade(
    layout: Layout, task: Task, prompts: Sequence[Prompt], completions: Completions
) -> Tensor:
    """Reward of every completion, [N] float64; NaN where the grader failed.

    Every rank grades its share and all get everything: each completion is graded once, so ranks
    agree even on a grader that does not always answer the same.
    """
    rows = _share(layout, len(prompts))
    rewards = [_grade_one(task, prompts[row], completions.row(row)) for row in rows]
    rewards_N = torch.tensor(rewards, dtype=torch.float64, device=layout.device)
    return all_gather_rows(rewards_N)[: len(prompts)].cpu()


def _share(layout: Layout, count: int) -> list[int]:
    """This rank's rows; those past the end repeat the last one and are cut off after gathering."""
    per_rank = -(-count // layout.world_size)
    return [min(layout.rank * per_rank + i, count - 1) for i in range(per_rank)]


def _grade_one(task: Task, prompt: Prompt, completion: list[int]) -> float:
    try:
        return float(task.grade(prompt, completion))
    except (Exception, SystemExit):
        # A grader is foreign code: whatever it raises is one failed grade, which is counted.
        return float("nan")
