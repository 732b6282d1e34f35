"""Log-probs and entropy of tokens from hidden states, without ever holding the logits [T, V].

With x = h W^T / temperature the logits of a token, split over the tensor-parallel ranks along the
vocabulary (ours; the sums are the online softmax of arXiv 1805.02867):

    log pi(y) = x_y - lse(x)            H = lse(x) - sum_v p_v x_v            p = softmax(x)
    dL/dx = g (1_y - p) - g_H p (log p + H)         g = dL/dlog pi(y),  g_H = dL/dH

The vocabulary is walked in chunks. Forward keeps a running maximum and sums per token; backward
computes each chunk of logits once more. Three collectives over the tensor-parallel ranks in all:
the maxima and the sums after the forward loop, dL/dh after the backward loop. Rows of a padded
vocabulary take no part. Here are the matrix products and the loops; what is done to a chunk in
between is in ``logprob_chunks``. Axes: T tokens, H hidden, V vocabulary (v on this rank), c of a
chunk.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_apo.parallel.logprob_chunks import Chunks, Slope, Sums, TorchChunks

# "exact" computes float32 logits whatever the inputs, "bf16" rounds them to the inputs' dtype (on
# a sum over a thousand tokens about 0.2 nats), "keep_logits" does as "bf16" and keeps them for the
# backward pass in place of a second product.
MODES = ("exact", "bf16", "keep_logits")
# Vocabulary rows at a time: a product large enough to run at full speed, a small share of V.
CHUNK = 8192


@dataclass(frozen=True)
class _Head:
    """This rank's part of the output layer and how to multiply with it.

    Attributes:
        weight_vH: its rows.
        first: vocabulary id of the first of them.
        valid: how many of them are vocabulary, the rest is padding.
        group: the tensor-parallel group.
        scale: 1 / temperature.
        mode: one of ``MODES``.
        backend: one of ``BACKENDS``.
        main_grad_of: the parameter whose ``main_grad`` takes the weight's gradient; None returns
            it to autograd.
        sums_hidden_grad: whether dL/dh is summed over the group.
    """

    weight_vH: Tensor
    first: int
    valid: int
    group: dist.ProcessGroup
    scale: float
    mode: str
    backend: str
    main_grad_of: Tensor | None
    sums_hidden_grad: bool

    @property
    def logits_dtype(self) -> torch.dtype:
        dtype = self.weight_vH.dtype
        return torch.promote_types(dtype, torch.float32) if self.mode == "exact" else dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """At least float32, whatever the logits are rounded to."""
        return torch.promote_types(self.weight_vH.dtype, torch.float32)

    @property
    def width(self) -> int:
        """Columns of the widest chunk."""
        return min(CHUNK, self.valid)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks of this rank's vocabulary rows."""
        for start in range(0, self.valid, CHUNK):
            yield start, min(start + CHUNK, self.valid)

    def chunks(self, hidden_TH: Tensor) -> Chunks:
        """What works on the chunks of one pass."""
        make = BACKENDS[self.backend]
        return make(hidden_TH.shape[0], self.width, self.sum_dtype, hidden_TH.device)

    def columns(self, targets_T: Tensor, start: int) -> Tensor:
        """Columns of the targets in the chunk that begins at ``start``."""
        return targets_T - (self.first + start)


class _Logits:
    """Logits of one chunk after the other (temperature not applied).

    They share one buffer, except where they are kept and on a GPU, whose allocator uses memory
    again and whose product of bf16 inputs with a float32 result takes no buffer.
    """

    def __init__(self, head: _Head, hidden_TH: Tensor, keep: bool) -> None:
        self._head, self._hidden_TH = head, hidden_TH
        self._buffer = None
        if not keep and not hidden_TH.is_cuda:
            self._buffer = self._room(head.width)

    def _room(self, width: int) -> Tensor:
        count = self._hidden_TH.shape[0] * width
        return torch.empty(count, dtype=self._head.logits_dtype, device=self._hidden_TH.device)

    def of_chunk(self, start: int, end: int) -> Tensor:
        """Logits [T, c] of the rows from ``start`` to ``end``; those before are overwritten."""
        hidden_TH, rows_cH = self._hidden_TH, self._head.weight_vH[start:end]
        dtype = self._head.logits_dtype
        if hidden_TH.is_cuda:
            return _product(hidden_TH, rows_cH.t(), dtype)
        room = self._room(end - start) if self._buffer is None else self._buffer
        out_Tc = room[: hidden_TH.shape[0] * (end - start)].view(-1, end - start)
        # A CPU has no product of bf16 inputs with a float32 result.
        return torch.mm(hidden_TH.to(dtype), rows_cH.to(dtype).t(), out=out_Tc)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product on a GPU, in the dtype of the inputs or in float32."""
    return torch.mm(left, right) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right; a CPU rounds the product of bf16 inputs before it is added."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(_product(left, right, total.dtype))
    else:
        total.add_(torch.mm(left, right))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, targets_T: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sums = Sums.empty(hidden_TH.shape[0], head.sum_dtype, hidden_TH.device)
        keep = head.mode == "keep_logits"
        chunks, logits, kept = head.chunks(hidden_TH), _Logits(head, hidden_TH, keep), []
        for start, end in head.bounds():
            logits_Tc = logits.of_chunk(start, end)
            kept += [logits_Tc] if keep else []
            chunks.add(sums, logits_Tc, head.columns(targets_T, start), head.scale)
            del logits_Tc  # a GPU's allocator then has its memory for the next chunk
        sums.combine(head.group)
        lse_T, entropy_T = sums.lse_T, sums.entropy_T
        logprobs_T = sums.target_T - lse_T
        ctx.save_for_backward(hidden_TH, weight_vH, targets_T, lse_T, logprobs_T, entropy_T)
        ctx.head, ctx.kept = head, kept
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return None, None, None, None
        hidden_TH, weight_vH, targets_T, *saved = ctx.saved_tensors
        head, kept = ctx.head, ctx.kept
        slope = Slope.of(*saved, *grads, head.scale)
        weight_grad = _WeightGrad(head, weight_vH)
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=head.sum_dtype)
        chunks, logits = head.chunks(hidden_TH), _Logits(head, hidden_TH, keep=bool(kept))
        for index, (start, end) in enumerate(head.bounds()):
            logits_Tc = kept[index] if kept else logits.of_chunk(start, end)
            in_place = logits_Tc.dtype == hidden_TH.dtype
            slope_Tc = logits_Tc if in_place else torch.empty_like(logits_Tc, dtype=hidden_TH.dtype)
            columns_T = head.columns(targets_T, start)
            chunks.write_slope(slope_Tc, logits_Tc, columns_T, slope, head.scale)
            weight_grad.take(start, end, slope_Tc, hidden_TH)
            _add_product(grad_hidden_TH, slope_Tc, weight_vH[start:end])
            del logits_Tc, slope_Tc
        ctx.kept = []  # they hold slopes now; a second backward pass computes logits again
        if head.sums_hidden_grad and dist.get_world_size(head.group) > 1:
            dist.all_reduce(grad_hidden_TH, group=head.group)
        return grad_hidden_TH.to(hidden_TH.dtype), weight_grad.returned_vH, None, None


class _WeightGrad:
    """Where the slices of the weight's gradient go, each written once.

    Attributes:
        returned_vH: for autograd; None where megatron keeps the gradient.
    """

    def __init__(self, head: _Head, weight_vH: Tensor) -> None:
        self.returned_vH = self._main_vH = None
        if head.main_grad_of is not None:
            self._main_vH = head.main_grad_of.main_grad  # type: ignore[attr-defined]
            # What megatron's linear layers say where they add to main_grad themselves.
            head.main_grad_of.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        else:
            self.returned_vH = torch.empty_like(weight_vH)
            self.returned_vH[head.valid :] = 0.0

    def take(self, start: int, end: int, slope_Tc: Tensor, hidden_TH: Tensor) -> None:
        """The slice of the rows from ``start`` to ``end``."""
        if self._main_vH is not None:
            _add_product(self._main_vH[start:end], slope_Tc.t(), hidden_TH)
        else:
            assert self.returned_vH is not None
            torch.mm(slope_Tc.t(), hidden_TH, out=self.returned_vH[start:end])


def _triton_chunks(*room: object) -> Chunks:
    """They need no room of their own."""
    from nemo_apo.parallel.logprob_chunks_triton import TritonChunks

    return TritonChunks()


BACKENDS: dict[str, Callable[[int, int, torch.dtype, torch.device], Chunks]] = {
    "torch": TorchChunks,
    "triton": _triton_chunks,
}


def usual_backend(device: torch.device) -> str:
    """Triton on a GPU where it is installed, as it is with torch's CUDA builds; else torch."""
    has_triton = importlib.util.find_spec("triton") is not None
    return "triton" if device.type == "cuda" and has_triton else "torch"


def linear_logprobs(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    mode: str = "exact",
    backend: str | None = None,
    into_main_grad: bool = False,
    sums_hidden_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each next-token distribution, [T], nats.

    Both are differentiable with respect to hidden states and weight, at least float32.

    Args:
        hidden_TH: hidden states, the same on all ranks of the group; float32, float64 or bf16.
        weight_vH: this rank's rows of the output layer, in the dtype of the hidden states.
        targets_T: token ids in [0, vocab_size), int64, the same on all ranks of the group.
        vocab_size: the unpadded vocabulary.
        group: the tensor-parallel group, in whose rank order the vocabulary is split evenly.
        temperature: divides the logits.
        mode: see ``MODES``; without effect where the hidden states are float32 or float64.
        backend: a name of ``BACKENDS``; None takes ``usual_backend``.
        into_main_grad: add the weight's gradient to ``weight_vH.main_grad``, where megatron's DDP
            gathers it (float32), in place of returning it to autograd.
        sums_hidden_grad: sum the gradient of the hidden states over the group. With sequence
            parallelism the gathering of the hidden states does that, in its backward pass.

    Raises:
        ValueError: for an unknown mode or backend.
    """
    backend = backend or usual_backend(hidden_TH.device)
    for name, value, choices in (("mode", mode, MODES), ("backend", backend, BACKENDS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    width = weight_vH.shape[0]
    first = dist.get_rank(group) * width
    head = _Head(
        weight_vH=weight_vH.detach(),
        first=first,
        valid=min(max(vocab_size - first, 0), width),
        group=group,
        scale=1.0 / temperature,
        mode=mode,
        backend=backend,
        main_grad_of=weight_vH if into_main_grad else None,
        sums_hidden_grad=sums_hidden_grad,
    )
    return _LinearLogProbs.apply(hidden_TH.contiguous(), weight_vH, targets_T, head)
