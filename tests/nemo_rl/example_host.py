"""Stands for NeMo-RL where a configuration is composed: its folder of examples, and the functions
that merge files and apply overrides, as it has them but for what these tests have no use for.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from tests.nemo_rl.example_config import EXAMPLE

# The examples that recipes start from; here they are one and the same.
EXAMPLES = (
    "grpo_math_1B.yaml",
    "grpo_math_1B_megatron.yaml",
    "grpo_math_8B.yaml",
    "grpo_math_8B_megatron.yaml",
)


class OverridesError(Exception):
    """As in NeMo-RL."""


def parse_hydra_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    try:
        OmegaConf.set_struct(cfg, True)
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        ConfigLoaderImpl._apply_overrides_to_config(overrides=parsed, cfg=cfg)
        return cfg
    except Exception as error:
        raise OverridesError(f"Failed to parse Hydra overrides: {error}") from error


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``nemo_rl`` be this one, whose folder is filled; returns the folder."""
    (folder / "examples" / "configs").mkdir(parents=True)
    for name in EXAMPLES:
        (folder / "examples" / "configs" / name).write_text(EXAMPLE)
    package, utils = ModuleType("nemo_rl"), ModuleType("nemo_rl.utils")
    package.__file__ = str(folder / "nemo_rl" / "__init__.py")
    config = ModuleType("nemo_rl.utils.config")
    vars(config).update(
        OverridesError=OverridesError,
        merge_with_override=_merge_with_override,
        parse_hydra_overrides=parse_hydra_overrides,
        register_omegaconf_resolvers=lambda: None,
    )
    for name in [name for name in sys.modules if name.startswith("nemo_rl.")]:
        monkeypatch.delitem(sys.modules, name)
    for module in (package, utils, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return folder


def _merge_with_override(base_config: DictConfig, override_config: DictConfig) -> DictConfig:
    return OmegaConf.merge(base_config, override_config)  # type: ignore[return-value]
