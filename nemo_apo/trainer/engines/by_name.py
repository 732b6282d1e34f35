"""Rollout engines by the name that ``rollout.engine`` gives them."""

import importlib.util
import os
from collections.abc import Callable

import torch

from nemo_apo.config import Config, require
from nemo_apo.trainer.engines.interface import RolloutEngine
from nemo_apo.trainer.engines.static import StaticEngine
from nemo_apo.trainer.engines.vllm import VllmEngine
from nemo_apo.trainer.engines.vllm_requests import check_vllm
from nemo_apo.trainer.policy import Policy

ENGINES: dict[str, Callable[[Policy, Config], RolloutEngine]] = {
    "static": StaticEngine,
    "vllm": VllmEngine,
}


def check_engine(config: Config) -> None:
    """Refuse an engine that cannot run here, and an offload from no GPU.

    Raises:
        ConfigError: with the reason; no process group is needed.
    """
    has_gpus = torch.cuda.is_available()
    rule = "there is no GPU memory to free: torch sees no CUDA device here"
    require(has_gpus or not config.rollout.offload, "rollout.offload", "true", rule)
    if config.rollout.engine == "vllm":
        is_installed = importlib.util.find_spec("vllm") is not None
        check_vllm(config, has_gpus, is_installed, os.environ)
