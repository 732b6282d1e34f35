"""The host's policy workers with eyes: each optimizer step's gradient, and the weights.

Nothing of a worker's behaviour changes. They stand in for the host's by the way that it offers for
this, ``worker_extension_cls_fqn``.
"""

from typing import Any

from torch import Tensor

from tests.nemo_rl import cpu_host

Named = dict[str, Tensor]


class Probe:
    """Over a worker of the host; all its methods are called on all workers together."""

    cfg: dict[str, Any]
    model: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cpu_host.attend_without_flash()
        super().__init__(*args, **kwargs)

    def watch_optimizer(self) -> None:
        """Begin to keep the gradients of optimizer steps."""
        self.seen: list[Named] = []
        step = self.optimizer.step

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            self.seen.append({name: _whole(p.grad) for name, p in self.model.named_parameters()})
            return step(*args, **kwargs)

        self.optimizer.step = watched_step

    def take_gradients(self) -> list[Named]:
        """The gradients of every optimizer step since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def use_dynamic_batching(self, enabled: bool) -> None:
        """The host reads it from its configuration at every call."""
        self.cfg["dynamic_batching"]["enabled"] = enabled

    def weights(self) -> Named:
        """The present weights."""
        return {name: _whole(p) for name, p in self.model.named_parameters()}

    def put_weights(self, weights: Named) -> None:
        """Replace the weights; the optimizer of the tests has no state."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert not any(self.optimizer.state.values())
        for name, parameter in self.model.named_parameters():
            value = weights[name].to(parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.data.copy_(value)


def _whole(tensor: Any) -> Tensor:
    """A copy of a tensor that may be spread over the workers."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()
