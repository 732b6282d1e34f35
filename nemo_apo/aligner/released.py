"""The PPO and Reinforce actors of the released NeMo-Aligner 0.7.0 with our loss.

Actors only: their trainers sample and weigh in ways of their own (``docs/aligner.md``), so a caller
puts our columns (``nemo_apo.aligner.columns``) into the batches itself.
"""

from collections.abc import Mapping
from typing import ClassVar

from nemo_apo.aligner import interface_guard
from nemo_apo.aligner.actor import ApoActorMixin

interface_guard.check(interface_guard.RELEASED)

from nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import (  # noqa: E402
    MegatronGPTActorModel,
)
from nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor import (  # noqa: E402
    MegatronGPTReinforceActorModel,
)


class ApoPPOActor(ApoActorMixin, MegatronGPTActorModel):
    """APO on the PPO actor; see ``ApoActorMixin``."""

    host_metrics: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "ppo_ratio": "ratio",
        "ppo_ratio_clamped": "ratio_clamped",
        "scaled_entropy": "scaled_entropy",
    }


class ApoReinforceActor(ApoActorMixin, MegatronGPTReinforceActorModel):
    """APO on the Reinforce actor; see ``ApoActorMixin``."""
