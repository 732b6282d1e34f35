"""The block ``apo`` of a NeMo-RL configuration."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from nemo_apo.plugin.settings import VOCAB_SIZE, ApoSettings, SettingsBlock

SHIPPED = "apo.yaml"
# Which groups are trained on is said by the host's own keys (``grpo.overlong_filtering`` ...), and
# log-probs are the host's: what is vocabulary is not asked here.
BLOCK = SettingsBlock(
    path="apo", file=f"nemo_rl/{SHIPPED}", left_out=frozenset({"groups", VOCAB_SIZE})
)


def read_settings(apo: DictConfig | Mapping[str, Any] | None) -> ApoSettings:
    """The settings of an ``apo`` block; without one, as shipped.

    Raises:
        ConfigError: as ``SettingsBlock.read``.
    """
    return BLOCK.read({} if apo is None else apo)
