"""Completions that a run keeps for a person to read: which, and in what form."""

import math
from collections.abc import Sequence

from nemo_apo.config import RunConfig
from nemo_apo.record import KeptCompletion, KeptGroup
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampling import Graded


def keeps_samples(run: RunConfig, step: int) -> bool:
    """Whether completions of RL step ``step`` (from 1) are kept."""
    return run.samples_every > 0 and (step % run.samples_every == 0 or step in (1, run.steps))


def kept_groups(
    step: int,
    task: Task,
    prompts: Sequence[Prompt],
    completions: Completions,
    graded: Graded,
    group_size: int,
    groups: int,
) -> tuple[KeptGroup, ...]:
    """The first groups of a rollout as they were drawn, before any is dropped.

    Args:
        step: the RL step, from 1.
        task: gives texts and references.
        prompts: one per completion, those of a group together.
        completions, graded: of these prompts.
        group_size: completions per prompt.
        groups: how many at most.
    """
    starts = range(0, min(groups * group_size, len(prompts)), group_size)

    def completion(row: int) -> KeptCompletion:
        tokens, reward = completions.row(row), float(graded.rewards_N[row])
        return KeptCompletion(
            text=task.text(tokens),
            reward=reward if math.isfinite(reward) else None,
            length=len(tokens),
            truncated=not bool(completions.finished_N[row]),
            failed=graded.reasons[row],
        )

    return tuple(
        KeptGroup(
            step=step,
            prompt=prompts[start].text,
            reference=task.reference(prompts[start]),
            completions=tuple(completion(row) for row in range(start, start + group_size)),
        )
        for start in starts
    )
