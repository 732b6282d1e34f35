"""The loss that the host's workers compute: an objective's plain token sum.

An instance crosses Ray to workers whose environment is their own, so this module and what it
imports need torch and nothing else; the host's own enums are looked up where the host asks.

Axes: B sequences of a micro-batch, S tokens, T = S - 1 targets.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_apo.core.objectives import Objective, Regularizers
from nemo_apo.core.objectives.interface import masked
from nemo_apo.core.objectives.regularizers import k3
from nemo_apo.nemo_rl.columns import (
    SAMPLE_MASK,
    SAMPLER_LOGPROBS,
    targets,
    token_inputs,
)
from nemo_apo.plugin.columns import attached

# Sums over completion tokens that the driver divides; they do not reach the host's log.
TOKEN_SUMS = ("apo_clipped_tokens", "apo_tokens")


class ApoLoss:
    """``LossFunction`` of the host for any objective of this package.

    The batch must hold the columns of ``nemo_apo.plugin.columns``: everything that couples
    sequences is settled in them, so the loss of a global batch is the sum over its micro-batches,
    however they were cut or packed.

    Args:
        objective, regularizers: the run's; the latter without an entropy bonus, which needs the
            logits.
        fused_linear_logprobs: whether the host's Megatron workers compute log-probs from the
            hidden states; they ask the loss for it.
    """

    def __init__(
        self,
        objective: Objective,
        regularizers: Regularizers,
        fused_linear_logprobs: bool = False,
    ) -> None:
        assert regularizers.entropy_coef == 0.0, "to be refused before a run starts"
        self.objective = objective
        self.regularizers = regularizers
        self.use_fused_linear_logprobs = fused_linear_logprobs

    @property
    def loss_type(self) -> Any:
        """The host's ``LossType``: divisors are settled before the split."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """The host's ``LossInputType``."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    def __call__(
        self,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        next_token_logprobs: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's part of the loss, and of the metrics that the host wants.

        Args:
            data: the micro-batch, the host's columns and ours.
            global_valid_seqs: not used: divisors are settled before the split.
            global_valid_toks: completion tokens of the global batch; divides the host's metrics.
            next_token_logprobs: log-prob of each target, [B, T], float32, nats, differentiable.
        """
        inputs = token_inputs(data, next_token_logprobs)
        columns = attached(data, next_token_logprobs)
        loss = self.objective.token_loss(inputs, columns)
        loss = loss + self.regularizers.token_loss(inputs, columns)
        with torch.no_grad():
            mask_BT = inputs.mask_BT
            sampler_BT = targets(data[SAMPLER_LOGPROBS]).to(mask_BT.device)
            gap_BT = masked(inputs.old_logprobs_BT - sampler_BT, mask_BT)
            ratio_BT = torch.exp(masked(inputs.logprobs_BT - inputs.old_logprobs_BT, mask_BT))
            tokens = global_valid_toks.to(mask_BT.device).clamp(min=1)
            metrics = {
                "loss": loss,
                "num_valid_samples": data[SAMPLE_MASK].sum().to(mask_BT.device),
                # How far sampler and trainer are apart: the factor between the two probabilities
                # of a token (>= 1), and KL(sampler || trainer) by k3 from samples of the sampler.
                "token_mult_prob_error": masked(gap_BT.abs().exp(), mask_BT).sum() / tokens,
                "gen_kl_error": masked(k3(-gap_BT), mask_BT).sum() / tokens,
                "probs_ratio": masked(ratio_BT, mask_BT).sum() / tokens,
                TOKEN_SUMS[0]: self.objective.clipped_tokens(inputs, columns),
                TOKEN_SUMS[1]: mask_BT.sum(),
            }
            # One transfer for all of them.
            values = torch.stack([value.double() for value in metrics.values()]).tolist()
        return loss, dict(zip(metrics, values, strict=True))
