"""The host's training data in our terms: groups by position, one row of scalars per sequence.

Axes: N sequences of the rollout, S tokens, T = S - 1 targets.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.filtering import GroupRules, SettledGroups, settle_groups
from nemo_apo.core.groups import Groups
from nemo_apo.core.settling import SequenceFigures
from nemo_apo.nemo_rl.baselines import Baselines
from nemo_apo.nemo_rl.columns import (
    ADVANTAGES,
    LENGTHS,
    OLD_LOGPROBS,
    REFERENCE_LOGPROBS,
    SAMPLE_MASK,
    SAMPLER_LOGPROBS,
    TOKEN_MASK,
    TOKENS,
    targets,
)
from nemo_apo.plugin.rollout import RolloutError, foreign_prompts

# A sequence that the host has masked out (too long a prompt, cut at the limit, sampler and trainer
# too far apart) takes its group with it: the others would be compared with a group that it is not.
_RULES = GroupRules(truncated="drop")


def group_ids(count: int, group_size: int) -> Tensor:
    """Which group each row of the rollout belongs to: the host repeats every prompt in place.

    Raises:
        RolloutError: if the rows are no whole number of groups.
    """
    if count % group_size != 0:
        raise RolloutError(
            f"the rollout has {count} sequences, which is not a whole number of groups of "
            f"grpo.num_generations_per_prompt={group_size}"
        )
    return torch.arange(count) // group_size


def completion_mask(data: Mapping[str, Tensor]) -> Tensor:
    """Which targets are completion tokens, of masked sequences too, [N, T] bool."""
    return targets(data[TOKEN_MASK]).bool().cpu()


def rewards(data: Mapping[str, Tensor], baselines: Baselines) -> Tensor:
    """Rewards as the host's trainer uses them, [N] float64.

    Raises:
        RolloutError: if advantages differ from token to token, or a reward is not finite.
    """
    advantages_NS = data[ADVANTAGES].cpu()
    advantages_N = advantages_NS[:, 0]
    if not torch.equal(advantages_NS, advantages_N[:, None].expand_as(advantages_NS)):
        finite = bool(torch.isfinite(advantages_NS).all())
        why = "differ from token to token" if finite else "are not all finite"
        raise RolloutError(f"advantages {why}: they must be reward less group mean, nothing else")
    rewards_N = baselines.rewards(advantages_N)
    if not bool(torch.isfinite(rewards_N).all()):
        failed = int((~torch.isfinite(rewards_N)).sum())
        raise RolloutError(
            f"{failed} of {len(rewards_N)} rewards are not finite; an environment must give a "
            "number to every answer"
        )
    return rewards_N


def settle_rollout(
    data: Mapping[str, Tensor], rewards_N: Tensor, mask_NT: Tensor, ids_N: Tensor
) -> SettledGroups:
    """Which groups are trained on.

    Raises:
        RolloutError: if the completions of a group answer different prompts.
    """
    groups = Groups.from_ids(ids_N)
    tokens_NS = data[TOKENS].cpu()
    mixed_N = foreign_prompts(tokens_NS, _prompt_lengths(data, mask_NT), groups)
    if bool(mixed_N.any()):
        raise RolloutError(
            f"{int(mixed_N.sum())} completions stand beside the prompt of another group: the "
            "rollout was reordered, or filtered one by one"
        )
    masked_N = data[SAMPLE_MASK].cpu() == 0
    return settle_groups(rewards_N, mask_NT.sum(dim=1), masked_N, groups, _RULES)


def _prompt_lengths(data: Mapping[str, Tensor], mask_NT: Tensor) -> Tensor:
    """Tokens before the first completion token, [N]; all of them where there is none."""
    first_N = mask_NT.to(torch.int8).argmax(dim=1) + 1
    return torch.where(mask_NT.any(dim=1), first_N, data[LENGTHS].cpu())


def sequence_figures(
    data: Mapping[str, Tensor],
    rewards_N: Tensor,
    mask_NT: Tensor,
    ids_N: Tensor,
    anchor: str,
    has_reference: bool,
) -> SequenceFigures:
    """The rollout's row of scalars per sequence, on the CPU.

    The host computes no entropies. That of the policy that sampled is estimated by minus the
    log-probs of what it sampled, whose expectation it is.

    Args:
        anchor: "old" or "reference".
        has_reference: whether the reference's log-probs are there, and no placeholder.
    """

    def sums(column: str) -> Tensor:
        return sequence_sums(targets(data[column]).cpu(), mask_NT)

    old_N = sums(OLD_LOGPROBS)
    reference_N = sums(REFERENCE_LOGPROBS) if has_reference else None
    anchor_N = reference_N if anchor == "reference" else old_N
    assert anchor_N is not None, "to be refused before a run starts"
    return SequenceFigures(
        group_ids_N=ids_N,
        rewards_N=rewards_N,
        lengths_N=mask_NT.sum(dim=1).to(torch.float64),
        entropy_sums_N=-old_N,
        old_logprob_sums_N=old_N,
        anchor_logprob_sums_N=anchor_N,
        reference_logprob_sums_N=reference_N,
        sampler_logprob_sums_N=sums(SAMPLER_LOGPROBS),
    )
