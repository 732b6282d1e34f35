"""``nemo-apo train`` of which one rank is killed or stopped on the way.

python -m tests.abuse.faulty_train RANK SIGNAL PHASE [arguments]: when rank RANK comes to PHASE in
the third RL step, it sends itself SIGNAL. Every RL step saves, and takes four optimizer steps of
four micro-batches.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_apo.cli import main
from nemo_apo.trainer import checkpoint_write, rollout_source
from nemo_apo.trainer.policy import Policy

_FORWARD_CALL, _BACKWARD_CALL = 2 * 4 + 2, 2 * 16 + 6


def _faulty(work: Callable[..., Any], number: int, at_call: int = 3) -> Callable[..., Any]:
    """The same function; its call ``at_call`` does not return."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            print(f"faulty: rank {os.environ['RANK']} gets signal {number}", flush=True)
            os.kill(os.getpid(), number)
        return work(*args, **kwargs)

    return called


class _Backward(torch.autograd.Function):
    """Does nothing but tell when the backward pass comes by."""

    tell: Callable[[], None]

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _Backward.tell()
        return grads[0]


def _in_backward(number: int) -> None:
    """Of every stage: its layers' output."""
    from nemo_apo.trainer.model import HiddenStateGPT

    forward = HiddenStateGPT.forward
    _Backward.tell = staticmethod(_faulty(lambda: None, number, _BACKWARD_CALL))  # type: ignore[assignment]

    def watched(self: HiddenStateGPT, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return _Backward.apply(output) if output.requires_grad else output

    HiddenStateGPT.forward = watched  # type: ignore[method-assign]


def _in_rollout(number: int) -> None:
    rollout_source.complete = _faulty(rollout_source.complete, number)


def _in_forward(number: int) -> None:
    Policy.accumulate = _faulty(Policy.accumulate, number, _FORWARD_CALL)  # type: ignore[method-assign]


def _in_save(number: int) -> None:
    checkpoint_write.write_shards = _faulty(checkpoint_write.write_shards, number)


PHASES: dict[str, Callable[[int], None]] = {
    "rollout": _in_rollout,
    "forward": _in_forward,
    "backward": _in_backward,
    "save": _in_save,
}


if __name__ == "__main__":
    rank, name, phase, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        PHASES[phase](getattr(signal, name))
    sys.exit(main(arguments))
