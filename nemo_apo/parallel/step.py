"""Forward and backward over micro-batches by megatron's schedules.

The losses of this package are plain sums, so the gradient wanted is the plain sum over
micro-batches and data-parallel ranks. ``plain_sum`` is the one place that sees to it: with
``calculate_per_token_loss`` megatron neither divides by the number of micro-batches nor averages
over ranks, and withholding the token count from ``finalize_model_grads`` keeps it from dividing by
that. Axes: B sequences of a micro-batch, T tokens, N sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Turns the model's output and the micro-batch into (loss sum, detached numbers to keep).
LossFunction = Callable[[Tensor, Any], tuple[Tensor, dict[str, Tensor]]]
# Turns the model's output and the micro-batch into numbers to keep, without gradient.
ReadFunction = Callable[[Tensor, Any], dict[str, Tensor]]


def plain_sum(config: TransformerConfig) -> None:
    """Make megatron's gradient the plain sum of the micro-batch losses over all ranks."""
    assert config.calculate_per_token_loss

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kw: Any) -> None:
        finalize_model_grads(model, num_tokens=None, **kw)

    config.finalize_model_grads_func = finalize


def causal_mask(length: int, device: torch.device) -> Tensor:
    """True where attention is forbidden, [1, 1, T, T]."""
    ones_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    return torch.triu(ones_TT, diagonal=1)[None, None]


def _forward(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Run the model on the next micro-batch: an object with ``inputs_BT`` (int64 token ids)."""
    batch = next(batches)
    inputs_BT = batch.inputs_BT
    length = inputs_BT.shape[1]
    positions_BT = torch.arange(length, device=inputs_BT.device).expand_as(inputs_BT)
    return model(inputs_BT, positions_BT, causal_mask(length, inputs_BT.device)), batch


def run_micro_batches(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[Any], loss_function: LossFunction
) -> list[dict[str, Tensor]]:
    """Forward and backward; gradients are added to the model's gradient buffers and reduced.

    Args:
        chunks: the wrapped (DDP) chunks of this rank's stage, one without a virtual pipeline.
        micro_batches: equally shaped micro-batches, the same number on every rank.
        loss_function: called on the last pipeline stage.

    Returns:
        What ``loss_function`` kept, per micro-batch; empty on other stages.
    """

    def loss(batch: Any, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        value, kept = loss_function(output, batch)
        # The count is withheld from the gradient (see plain_sum); megatron only wants an integer.
        return value, torch.ones((), dtype=torch.int, device=value.device), kept

    def forward_step(batches: Iterator[Any], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        output, batch = _forward(batches, stage)
        return output, partial(loss, batch)

    return _run(chunks, micro_batches, forward_step, forward_only=False)


@torch.no_grad()
def read_micro_batches(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[Any], read_function: ReadFunction
) -> list[dict[str, Tensor]]:
    """Forward only; returns what ``read_function`` kept per micro-batch (last stage only)."""

    def read(batch: Any, output: Tensor, non_loss_data: bool = False) -> dict[str, Tensor]:
        return read_function(output, batch)

    def forward_step(batches: Iterator[Any], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        output, batch = _forward(batches, stage)
        return output, partial(read, batch)

    return _run(chunks, micro_batches, forward_step, forward_only=True)


def _run(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Any],
    forward_step: Any,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    rows, length = micro_batches[0].inputs_BT.shape
    run = get_forward_backward_func()
    # megatron asks for the whole sequence's length, of which a context-parallel rank holds a part.
    length *= parallel_state.get_context_parallel_world_size()
    # Every chunk sees every micro-batch.
    batches = [iter(micro_batches) for _ in chunks]
    return run(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
