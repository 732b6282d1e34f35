"""Norms of query and key in the layers that NeMo builds.

``qk_layernorm`` of a model's configuration reaches Megatron's layer configuration, but NeMo does
not ask for these norms when it chooses the layer's parts, so the model is built without them. Here
they are put into the chosen layer, for the time in which an actor builds its model.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from nemo_apo.aligner.interface_guard import check
from nemo_apo.config import ConfigError
from nemo_apo.plugin.interface_guard import Needed

NEMO_MODULE = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
_CHOICE = "get_specs"
_MEGATRON_MODULE = "megatron.core.models.gpt.gpt_layer_specs"
# The names under which NeMo chooses Megatron's own layers, and who builds each.
_BUILDERS = {
    "": "get_gpt_layer_local_spec",
    "te_gpt": "get_gpt_layer_with_transformer_engine_spec",
}
_NORMS = ("q_layernorm", "k_layernorm")

NEEDED = (
    Needed(NEMO_MODULE, _CHOICE, ("spec_name", "transformer_config", "use_te")),
    *(Needed(_MEGATRON_MODULE, name, ("qk_layernorm",)) for name in _BUILDERS.values()),
)


@contextlib.contextmanager
def query_key_norms(wanted: bool) -> Iterator[None]:
    """NeMo chooses layers with norms of query and key while this lasts; not wanted, as ever.

    Raises:
        InterfaceMismatch: if NeMo or Megatron is not as expected.
    """
    if not wanted:
        yield
        return
    check(NEEDED)
    nemo = importlib.import_module(NEMO_MODULE)
    choose = getattr(nemo, _CHOICE)
    setattr(nemo, _CHOICE, _with_norms(choose))
    try:
        yield
    finally:
        setattr(nemo, _CHOICE, choose)


def _with_norms(choose: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(choose)
    def chosen(
        spec_name: str,
        transformer_config: Any = None,
        use_te: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        builder = _builder(spec_name, use_te)
        layer = choose(spec_name, transformer_config, use_te, *args, **kwargs)
        # Which class the norm has is Megatron's choice: it depends on what is installed.
        pattern = builder(qk_layernorm=True).submodules.self_attention.submodules
        for norm in _NORMS:
            setattr(layer.submodules.self_attention.submodules, norm, getattr(pattern, norm))
        return layer

    return chosen


def _builder(spec_name: str, use_te: bool) -> Callable[..., Any]:
    """Megatron's builder of the layer that NeMo chooses."""
    # NeMo's rule: without a name, the flag decides.
    name = "te_gpt" if use_te and spec_name == "" else spec_name
    if name not in _BUILDERS:
        raise ConfigError(
            f"model.name={name}: NeMo's layer of this name has no norms of query and key, but "
            "model.qk_layernorm=True"
        )
    return getattr(importlib.import_module(_MEGATRON_MODULE), _BUILDERS[name])
