"""The columns of the host that are read, named once, and what they say of targets.

The host's [B, S] columns speak of tokens: position t holds what is known of token t. The core
speaks of targets: position t holds what is known of token t + 1, so the first position is left
out. Axes: B sequences of a micro-batch, S tokens, T = S - 1 targets.
"""

from collections.abc import Mapping

from torch import Tensor

from nemo_apo.core.objectives import TokenInputs

TOKENS = "input_ids"
LENGTHS = "input_lengths"
TOKEN_MASK = "token_mask"
SAMPLE_MASK = "sample_mask"
ADVANTAGES = "advantages"
SAMPLER_LOGPROBS = "generation_logprobs"
OLD_LOGPROBS = "prev_logprobs"
REFERENCE_LOGPROBS = "reference_policy_logprobs"
ROUTED_EXPERTS = "routed_experts"


def targets(column_BS: Tensor) -> Tensor:
    """A column of the host by targets, [B, T]."""
    return column_BS[:, 1:]


def target_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which targets are completion tokens of sequences that count, [B, T] bool."""
    counts_B1 = batch[SAMPLE_MASK].bool().unsqueeze(-1)
    return targets(batch[TOKEN_MASK]).bool() & counts_B1


def token_inputs(micro_batch: Mapping[str, Tensor], logprobs_BT: Tensor) -> TokenInputs:
    """What a micro-batch knows of its tokens, on the device of its log-probs."""
    device = logprobs_BT.device
    reference_BS = micro_batch.get(REFERENCE_LOGPROBS)
    return TokenInputs(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=targets(micro_batch[OLD_LOGPROBS]).to(device),
        mask_BT=target_mask(micro_batch).to(device),
        reference_logprobs_BT=None if reference_BS is None else targets(reference_BS).to(device),
    )
