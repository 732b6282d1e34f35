"""The GRPO actor of NeMo-Aligner's branch ``llama-nemotron-dev`` with our loss."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from nemo_apo.aligner.actor import ApoActorMixin
from nemo_apo.aligner.branch import MegatronGPTActorModel, allgather_cp_sharded_tensor

# Where the host notes the length of sequences before padding for context parallelism.
_UNPADDED_LENGTH = "cp_unpadded_seqlen"


class ApoGRPOActor(ApoActorMixin, MegatronGPTActorModel):
    """APO on the GRPO actor; see ``ApoActorMixin``."""

    host_metrics: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "grpo_ratio": "ratio",
        "grpo_ratio_clamped": "ratio_clamped",
    }

    def _whole_sequences(
        self, micro_batch: Mapping[str, Any] | None, tokens_BT: Tensor, logits_BTv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Under context parallelism: gather the logits and take the host's padding off."""
        if micro_batch is None or _UNPADDED_LENGTH not in micro_batch:
            return tokens_BT, logits_BTv
        length = micro_batch[_UNPADDED_LENGTH][0]
        logits_BTv = allgather_cp_sharded_tensor(logits_BTv, seq_dim=1)
        return tokens_BT[:, :length], logits_BTv[:, :length]
