"""``model.apo`` of a NeMo-Aligner configuration."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from nemo_apo.config import require
from nemo_apo.plugin.settings import ApoSettings, SettingsBlock

SHIPPED = "gpt_apo.yaml"
BLOCK = SettingsBlock(path="model.apo", file=f"aligner/{SHIPPED}")


def read_settings(apo: DictConfig | Mapping[str, Any] | None) -> ApoSettings:
    """The settings of a ``model.apo`` section.

    Raises:
        ConfigError: where there is none, and as ``SettingsBlock.read``.
    """
    require(apo is not None, BLOCK.path, "null", f"is missing; start from {SHIPPED}")
    assert apo is not None
    return BLOCK.read(apo)
