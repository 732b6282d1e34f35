"""The GRPO actor of NeMo-Aligner's branch ``llama-nemotron-dev`` with our loss."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from nemo_apo.aligner.actor import ApoActorMixin
from nemo_apo.aligner.branch import (
    MegatronGPTActorModel,
    allgather_cp_sharded_tensor,
    conversion_dict,
)
from nemo_apo.aligner.host_rules import REFITTED_BACKENDS
from nemo_apo.aligner.layer_spec import query_key_norms
from nemo_apo.aligner.refit_mapping import extend_mapping, unmapped_rule, unmapped_weights
from nemo_apo.config import require
from nemo_apo.parallel.gather import all_gather_objects

# Where the host notes the length of sequences before padding for context parallelism.
_UNPADDED_LENGTH = "cp_unpadded_seqlen"


class ApoGRPOActor(ApoActorMixin, MegatronGPTActorModel):
    """APO on the GRPO actor; see ``ApoActorMixin``.

    Beside the loss: norms of query and key where the configuration asks for them, and a sampler
    that gets every weight of the policy.
    """

    host_metrics: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "grpo_ratio": "ratio",
        "grpo_ratio_clamped": "ratio_clamped",
    }

    def __init__(self, cfg: Any, trainer: Any) -> None:
        self._sends_every_weight = False
        if cfg.grpo.inference_backend.type in REFITTED_BACKENDS:
            extend_mapping(conversion_dict.mcore_te_to_hf_llama)
        super().__init__(cfg, trainer)

    def model_provider_func(self, pre_process: bool, post_process: bool) -> Any:
        """The host's model; its layers have the norms that the configuration asks for."""
        with query_key_norms(bool(self.cfg.get("qk_layernorm", False))):
            return super().model_provider_func(pre_process, post_process)

    def prepare_for_inference(self) -> None:
        """As the host, which then sends the weights to the sampler: all of them, or none."""
        if not self._sends_every_weight:
            self._check_every_weight_is_sent()
            self._sends_every_weight = True
        super().prepare_for_inference()

    def _check_every_weight_is_sent(self) -> None:
        """Raise, on all ranks, if the sampler would keep a weight of its own on any of them."""
        backend = self.cfg.grpo.inference_backend.type
        if backend not in REFITTED_BACKENDS:
            return
        mine = unmapped_weights(self.state_dict(), conversion_dict.mcore_te_to_hf_llama)
        # Every pipeline stage holds other weights.
        lost = sorted({name for names in all_gather_objects(mine) for name in names})
        key = "trainer.grpo.inference_backend.type"
        require(not lost, key, backend, unmapped_rule(lost))

    def _whole_sequences(
        self, micro_batch: Mapping[str, Any] | None, tokens_BT: Tensor, logits_BTv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Under context parallelism: gather the logits and take the host's padding off."""
        if micro_batch is None or _UNPADDED_LENGTH not in micro_batch:
            return tokens_BT, logits_BTv
        length = micro_batch[_UNPADDED_LENGTH][0]
        logits_BTv = allgather_cp_sharded_tensor(logits_BTv, seq_dim=1)
        return tokens_BT[:, :length], logits_BTv[:, :length]
