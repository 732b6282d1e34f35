"""megatron's optimizer into a checkpoint and out of it, sharded over data-parallel ranks or not.

The sharded one is saved in megatron's "fully_reshardable" form, gathered to one tensor per
parameter, so that other layouts can read it. With torch's AdamW, megatron 0.16.1 needs help with
it: its save expects moments before the first step, its load has no value for the step that torch
counts per parameter, and leaves all parameters one shared count, which then advances once for
each of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def optimizer_entries(
    optimizer: MegatronOptimizer, model: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """megatron's entries for the optimizer of the parameters in ``model``; collective."""
    _fill_moments(optimizer)
    return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_RESHARDABLE)


def take_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Put what was loaded into the optimizer, save for what its configuration decides."""
    decided = [_options(group) for group in optimizer.param_groups]
    parts = optimizer_parts(optimizer)
    with contextlib.ExitStack() as stack:
        for number, part in enumerate(parts):
            _restore_zero_step(part, loaded if len(parts) == 1 else loaded[number])
            stack.enter_context(_keeping_step(part))
        optimizer.load_state_dict(loaded)
    for part in parts:
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
    for group, options in zip(optimizer.param_groups, decided, strict=True):
        group.update(options)


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that megatron has chained, or the one that there is."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Options of a parameter group that follow from the configuration, not from training."""
    names = ("betas", "eps", "weight_decay")
    return {name: group[name] for name in names}


def _fill_moments(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the moments that it makes at its first step only."""
    for part in optimizer_parts(optimizer):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def _restore_zero_step(part: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Say that no step was taken: megatron leaves the count out of what it saves if it is 0."""
    counts = any("step" in state for state in part.optimizer.state.values())
    if counts and not isinstance(part, DistributedOptimizer):
        state = loaded.get("optimizer", loaded)["state"]
        state.setdefault("common_step", torch.tensor(0.0))


@contextlib.contextmanager
def _keeping_step(part: MegatronOptimizer) -> Iterator[None]:
    """Let the sharded optimizer load tensors that come without the step that torch counts."""
    if not isinstance(part, DistributedOptimizer):
        yield
        return
    original = part._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, index = part.model_param_group_index_map[model_param]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][index]]
        counted = {"step": own["step"]} if "step" in own else {}
        with torch.no_grad():
            original(model_param, {**counted, **tensors})

    part._set_main_param_and_optimizer_states = with_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
