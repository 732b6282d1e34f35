"""The host's global rollout in our terms: order, mask, and one row of scalars per sequence.

Axes: N sequences of the global rollout, T tokens (targets), S = T + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_apo.aligner.columns import GROUP_ID, TOKENS
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.filtering import SettledGroups, settle_groups
from nemo_apo.core.groups import Groups
from nemo_apo.core.settling import SequenceFigures
from nemo_apo.plugin.rollout import RolloutError, foreign_prompts
from nemo_apo.plugin.settings import ApoSettings

# Keys of the host's rollout.
_PROMPTS = "text"
_PROMPT_LENGTHS = "prompt_lengths"
_LOGPROBS = "logprobs"
_REFERENCE = "init_logprobs"
_SAMPLER = "response_trt_lps"
_REWARDS = "rewards"
_ENDED = "is_end"
# Relative difference of two sums of the same float32 log-probs that only their order explains.
_SAME_SUM = 1e-6


@dataclass(frozen=True)
class OwnReading:
    """Sums over completion tokens from the actor's own log-prob pass, [N] float64, nats."""

    logprob_sums_N: Tensor
    entropy_sums_N: Tensor


def check_rollout(rollout: Mapping[str, Any], group_size: int, vocab_size: int) -> None:
    """Check that the rollout is what sampling made: whole groups, known tokens.

    The rollout is the same on all ranks, so all of them raise.

    Raises:
        RolloutError: if group ids are missing, a group has another size than ``group_size``, the
            completions of a group answer different prompts, or a token id is outside the
            vocabulary.
    """
    if GROUP_ID not in rollout:
        raise RolloutError(
            f"the rollout has no column {GROUP_ID}: it was not sampled through this trainer's batch"
            " iterator, or an environment dropped it"
        )
    groups = Groups.from_ids(rollout[GROUP_ID])
    wrong = groups.sizes_G != group_size
    if bool(wrong.any()):
        raise RolloutError(
            f"trainer.grpo.samples_per_prompt={group_size}, but the rollout has "
            f"{int(wrong.sum())} of {groups.count} groups of other sizes, "
            f"{sorted(set(groups.sizes_G[wrong].tolist()))}"
        )
    mixed = foreign_prompts(rollout[_PROMPTS], rollout[_PROMPT_LENGTHS], groups)
    if bool(mixed.any()):
        raise RolloutError(
            f"{int(mixed.sum())} completions stand beside the prompt of another group: the rollout "
            "lost its order between sampling and training"
        )
    low, high = int(rollout[TOKENS].min()), int(rollout[TOKENS].max())
    if low < 0 or high >= vocab_size:
        raise RolloutError(f"token ids must lie in [0, {vocab_size}), got {low} to {high}")


def check_own(rollout_sums_N: Tensor, own: OwnReading) -> None:
    """Check that the actor's last log-prob pass is the one that the rollout holds.

    Raises:
        RolloutError: if they differ by more than rounding.
    """
    gap_N = (rollout_sums_N - own.logprob_sums_N).abs()
    allowed_N = _SAME_SUM * rollout_sums_N.abs().clamp(min=1.0)
    if bool((gap_N > allowed_N).any()):  # NaN on both sides passes, and is settled later
        raise RolloutError(
            "the rollout's log-probs are not those of the actor's last pass: sequences lost their "
            "order between the log-prob pass and training"
        )


def reorder(rollout: Mapping[str, Any], order_N: Tensor) -> dict[str, Any]:
    """Every column of the rollout in another order; columns are tensors or lists."""
    rows = order_N.tolist()
    return {
        key: value[order_N.to(value.device)]
        if isinstance(value, Tensor)
        else [value[row] for row in rows]
        for key, value in rollout.items()
    }


def settle_rollout(rollout: Mapping[str, Any], mask_NT: Tensor, apo: ApoSettings) -> SettledGroups:
    """Which groups are trained on, and their rewards; on the CPU."""
    return settle_groups(
        rollout[_REWARDS].cpu(),
        mask_NT.sum(dim=1).cpu(),
        rollout[_ENDED].cpu() == 0,
        Groups.from_ids(rollout[GROUP_ID].cpu()),
        apo.groups,
    )


def sequence_figures(
    rollout: Mapping[str, Any],
    mask_NT: Tensor,
    entropy_sums_N: Tensor,
    rewards_N: Tensor,
    anchor: str,
) -> SequenceFigures:
    """The rollout's row of scalars per sequence, on the CPU.

    A thousand numbers, whose sums every rank must get to the last bit: atomics on a GPU do not.
    """
    old_N = logprob_sums(rollout, mask_NT)
    reference_N = sequence_sums(rollout[_REFERENCE].to(mask_NT.device), mask_NT)
    anchor_N = reference_N if anchor == "reference" else old_N
    return SequenceFigures(
        group_ids_N=rollout[GROUP_ID].cpu(),
        rewards_N=rewards_N.cpu(),
        lengths_N=mask_NT.sum(dim=1).to(torch.float64).cpu(),
        entropy_sums_N=entropy_sums_N.cpu(),
        old_logprob_sums_N=old_N.cpu(),
        anchor_logprob_sums_N=anchor_N.cpu(),
        reference_logprob_sums_N=reference_N.cpu(),
        sampler_logprob_sums_N=_sampler_sums(rollout, mask_NT).cpu(),
    )


def logprob_sums(rollout: Mapping[str, Any], mask_NT: Tensor) -> Tensor:
    """Sequence log-probs under the policy that sampled, as the rollout holds them, [N] float64."""
    return sequence_sums(rollout[_LOGPROBS].to(mask_NT.device), mask_NT)


def _sampler_sums(rollout: Mapping[str, Any], mask_NT: Tensor) -> Tensor:
    """Sequence log-probs as the inference backend computed them, [N] float64.

    The backend's column counts tokens, ours targets: one less, and it may be padded otherwise.
    """
    sampler_NT = rollout[_SAMPLER].to(mask_NT.device)[:, 1:]
    width = mask_NT.shape[1]
    sampler_NT = torch.nn.functional.pad(sampler_NT, (0, max(0, width - sampler_NT.shape[1])))
    return sequence_sums(sampler_NT[:, :width], mask_NT)
