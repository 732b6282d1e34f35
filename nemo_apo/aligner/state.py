"""Our state in NeMo-Aligner's checkpoints."""

from typing import Any

from nemo_apo.config import ConfigError
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.plugin.state import ApoState

# Where it is in a checkpoint.
CHECKPOINT_KEY = "nemo_apo"
# What Lightning puts into every checkpoint of a training run, and a .nemo file does not have.
_TRAINING_CHECKPOINT = "global_step"


def restored(checkpoint: dict[str, Any], settings: ApoSettings) -> ApoState | None:
    """The state of a checkpoint; None where there is none to restore (initial weights).

    Raises:
        ConfigError: for a training checkpoint without our state, unless told to start fresh.
    """
    if CHECKPOINT_KEY in checkpoint:
        return ApoState.from_state_dict(checkpoint[CHECKPOINT_KEY], settings)
    if _TRAINING_CHECKPOINT in checkpoint and settings.resume.without_state == "error":
        raise ConfigError(
            "the checkpoint to resume from holds no APO state (it was not saved by nemo_apo): the "
            f"schedule would start anew; set {settings.prefix}resume.without_state=fresh to let it"
        )
    return None
