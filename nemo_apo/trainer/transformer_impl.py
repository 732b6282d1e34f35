"""Which code the transformer layers are made of: megatron's own, or Transformer Engine's."""

import importlib.util

from nemo_apo.config import LOCAL, TRANSFORMER_ENGINE, ModelConfig, require


def chosen_impl(model: ModelConfig, on_gpu: bool) -> str:
    """``LOCAL`` or ``TRANSFORMER_ENGINE``; every machine of a job must answer the same.

    Raises:
        ConfigError: if Transformer Engine is asked for where it cannot run.
    """
    wanted = model.transformer_impl
    available = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "auto":
        return TRANSFORMER_ENGINE if available and model.params_dtype == "bfloat16" else LOCAL
    if wanted == TRANSFORMER_ENGINE:
        lacks = "an installed transformer_engine" if on_gpu else "a CUDA device"
        require(available, "model.transformer_impl", wanted, f"needs {lacks}")
    return wanted
