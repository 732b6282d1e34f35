"""Which groups of a rollout are trained on, decided on the global rollout before any split.

A decision is always about a whole group: taking single completions out would change the group
that the others are compared with. Axes: N sequences, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups

FAILED_GRADE_RULES = ("value", "drop")
TRUNCATED_RULES = ("keep", "drop")


@dataclass(frozen=True)
class GroupRules:
    """What becomes of groups with a failed grade or a truncated completion.

    Attributes:
        failed_grade: "value" gives a grade that is not finite the reward ``failed_reward``;
            "drop" drops its group.
        failed_reward: that reward.
        truncated: "keep", or "drop" for the groups with a completion that hit the length limit.
    """

    failed_grade: str = "value"
    failed_reward: float = 0.0
    truncated: str = "keep"

    def __post_init__(self) -> None:
        if self.failed_grade not in FAILED_GRADE_RULES:
            raise ValueError(
                f"groups.failed_grade must be one of {FAILED_GRADE_RULES}, "
                f"got {self.failed_grade!r}"
            )
        if self.truncated not in TRUNCATED_RULES:
            raise ValueError(
                f"groups.truncated must be one of {TRUNCATED_RULES}, got {self.truncated!r}"
            )
        if not -float("inf") < self.failed_reward < float("inf"):
            raise ValueError(f"groups.failed_reward must be finite, got {self.failed_reward}")


@dataclass(frozen=True)
class SettledGroups:
    """The outcome.

    Attributes:
        keep_N: whether a sequence is trained on, bool.
        rewards_N: rewards with failed grades settled, float64 (meaningless where not kept).
        failed_grades: number of grades that were not finite.
        dropped: number of groups dropped, by the first reason that applied.
    """

    keep_N: Tensor
    rewards_N: Tensor
    failed_grades: int
    dropped: dict[str, int]


def settle_groups(
    rewards_N: Tensor, lengths_N: Tensor, truncated_N: Tensor, groups: Groups, rules: GroupRules
) -> SettledGroups:
    """Drop the groups that cannot be trained on and settle failed grades.

    A group is dropped if it has a single completion, if one of its completions has no token (the
    fully masked group among them), and where the rules say so.

    Args:
        rewards_N: rewards; a failed grade is any value that is not finite.
        lengths_N: completion tokens of each sequence, 0 allowed.
        truncated_N: whether the completion hit the length limit, bool.
        groups: the groups of the N sequences.
        rules: what to do about failed grades and truncated completions.
    """
    rewards_N = rewards_N.to(torch.float64)
    failed_N = ~torch.isfinite(rewards_N)
    reasons_G = {
        "single completion": groups.sizes_G < 2,
        "empty completion": _any(lengths_N < 1, groups),
    }
    if rules.failed_grade == "drop":
        reasons_G["failed grade"] = _any(failed_N, groups)
    if rules.truncated == "drop":
        reasons_G["truncated completion"] = _any(truncated_N, groups)
    keep_G = torch.ones(groups.count, dtype=torch.bool, device=rewards_N.device)
    dropped: dict[str, int] = {}
    for reason, hit_G in reasons_G.items():
        dropped[reason] = int((hit_G & keep_G).sum())
        keep_G &= ~hit_G
    return SettledGroups(
        keep_N=groups.spread(keep_G),
        rewards_N=torch.where(failed_N, rules.failed_reward, rewards_N),
        failed_grades=int(failed_N.sum()),
        dropped=dropped,
    )


def _any(flags_N: Tensor, groups: Groups) -> Tensor:
    return groups.sum(flags_N.to(torch.int64)) > 0
