"""What is used of NeMo-Aligner's branch ``llama-nemotron-dev``, imported once it fits."""

from nemo_apo.aligner import interface_guard

interface_guard.check(interface_guard.GRPO)

from nemo.utils import logging  # noqa: E402
from nemo_aligner.experimental.grpo.algorithms.grpo import GRPOTrainer  # noqa: E402
from nemo_aligner.experimental.grpo.models.nlp.gpt import conversion_dict  # noqa: E402
from nemo_aligner.experimental.grpo.models.nlp.gpt.megatron_gpt_grpo_actor import (  # noqa: E402
    MegatronGPTActorModel,
    allgather_cp_sharded_tensor,
)
from nemo_aligner.experimental.grpo.utils import parallel_state  # noqa: E402
from nemo_aligner.utils.ppo_utils import create_mask  # noqa: E402
from nemo_aligner.utils.train_utils import clip_gradients, set_eval  # noqa: E402

__all__ = [
    "GRPOTrainer",
    "MegatronGPTActorModel",
    "allgather_cp_sharded_tensor",
    "clip_gradients",
    "conversion_dict",
    "create_mask",
    "logging",
    "parallel_state",
    "set_eval",
]
