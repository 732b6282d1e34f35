"""Log-probs and entropy of tokens from hidden states, without ever holding the logits [T, V].

With x = h W^T / temperature the logits of a token, split over the tensor-parallel ranks along the
vocabulary (ours; the sums are the online softmax of arXiv 1805.02867):

    log pi(y) = x_y - lse(x)            H = lse(x) - sum_v p_v x_v            p = softmax(x)
    dL/dx = g (1_y - p) - g_H p (log p + H)         g = dL/dlog pi(y),  g_H = dL/dH

The vocabulary is walked in chunks. Forward keeps a running maximum and sums per token; backward
computes each chunk of logits once more. Three collectives over the tensor-parallel ranks in all:
the maxima and the sums after the forward loop, dL/dh after the backward loop. Rows of a padded
vocabulary take no part. Axes: T tokens, H hidden, V vocabulary (v on this rank), c of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# "exact" computes float32 logits whatever the inputs, "bf16" rounds them to the inputs' dtype (on
# a sum over a thousand tokens about 0.2 nats), "keep_logits" does as "bf16" and keeps them for the
# backward pass in place of a second product.
MODES = ("exact", "bf16", "keep_logits")
# Vocabulary rows at a time: a product large enough to run at full speed, a small share of V.
CHUNK = 8192
# Tokens whose part of a chunk is worked on at once: it stays in a CPU core's cache.
_CPU_ROWS = 64


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
    """

    weight_vH: Tensor
    first: int
    valid: int
    group: dist.ProcessGroup
    scale: float
    mode: str

    @property
    def logits_dtype(self) -> torch.dtype:
        dtype = self.weight_vH.dtype
        return torch.promote_types(dtype, torch.float32) if self.mode == "exact" else dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """At least float32, whatever the logits are rounded to."""
        return torch.promote_types(self.weight_vH.dtype, torch.float32)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Bounds of the chunks of this rank's vocabulary rows."""
        for start in range(0, self.valid, CHUNK):
            yield start, min(start + CHUNK, self.valid)

    def product(self, hidden_TH: Tensor, start: int, end: int, out_Tc: Tensor) -> Tensor:
        """Logits of a chunk (temperature not applied), written to ``out_Tc``."""
        rows_cH = self.weight_vH[start:end]
        if out_Tc.dtype == hidden_TH.dtype:
            return torch.mm(hidden_TH, rows_cH.t(), out=out_Tc)
        if hidden_TH.is_cuda:
            return torch.mm(hidden_TH, rows_cH.t(), out_dtype=out_Tc.dtype)
        # A CPU has no product of bf16 inputs with a float32 result.
        return torch.mm(hidden_TH.to(out_Tc.dtype), rows_cH.to(out_Tc.dtype).t(), out=out_Tc)


@dataclass
class _Sums:
    """Running sums over the vocabulary, [T] each, in ``_Head.sum_dtype``.

    Attributes:
        peak_T: largest logit so far.
        total_T: sum of exp(x - peak).
        moment_T: sum of exp(x - peak) (x - peak).
        target_T: the target's logit where this rank holds it.
    """

    peak_T: Tensor
    total_T: Tensor
    moment_T: Tensor
    target_T: Tensor

    @classmethod
    def empty(cls, count: int, dtype: torch.dtype, device: torch.device) -> "_Sums":
        zeros_T = torch.zeros(count, dtype=dtype, device=device)
        return cls(
            torch.full_like(zeros_T, float("-inf")), zeros_T, zeros_T.clone(), zeros_T.clone()
        )

    def move_peak(self, peak_T: Tensor) -> None:
        """Measure the sums from another peak; a rank without vocabulary has none to measure."""
        shift_T = torch.where(self.total_T > 0.0, self.peak_T - peak_T, 0.0)
        factor_T = torch.exp(shift_T)
        self.moment_T = factor_T * (self.moment_T + shift_T * self.total_T)
        self.total_T = factor_T * self.total_T
        self.peak_T = peak_T

    def add(self, logits_Tc: Tensor, scale: float, work: Tensor) -> None:
        """Take in a chunk of logits."""
        peak_T = logits_Tc.amax(dim=-1).to(self.peak_T.dtype)
        self.move_peak(torch.maximum(self.peak_T, peak_T if scale == 1.0 else peak_T * scale))
        for rows in _row_blocks(logits_Tc):
            x_Bc = _scaled(logits_Tc[rows], scale, work)
            x_Bc.sub_(self.peak_T[rows, None])
            exp_Bc = torch.exp(x_Bc)
            self.total_T[rows] += exp_Bc.sum(dim=-1)
            self.moment_T[rows] += torch.linalg.vecdot(exp_Bc, x_Bc)

    def combine(self, group: dist.ProcessGroup) -> None:
        """Sums over all ranks of the tensor-parallel group."""
        if dist.get_world_size(group) == 1:
            return
        peak_T = self.peak_T.clone()
        dist.all_reduce(peak_T, op=dist.ReduceOp.MAX, group=group)
        self.move_peak(peak_T)
        sums_3T = torch.stack([self.total_T, self.moment_T, self.target_T])
        dist.all_reduce(sums_3T, group=group)
        self.total_T, self.moment_T, self.target_T = sums_3T


def _row_blocks(logits_Tc: Tensor) -> Iterator[slice]:
    """Tokens to work on at once: all of them on a GPU."""
    count = logits_Tc.shape[0]
    step = count if logits_Tc.is_cuda else _CPU_ROWS
    for start in range(0, count, max(1, step)):
        yield slice(start, start + step)


def _workspace(head: _Head, hidden_TH: Tensor) -> Tensor:
    """Room for one block of a chunk in the dtype of the sums."""
    count = hidden_TH.shape[0]
    rows = count if hidden_TH.is_cuda else min(count, _CPU_ROWS)
    shape = (rows, min(CHUNK, head.valid))
    return torch.empty(shape, dtype=head.sum_dtype, device=hidden_TH.device)


def _scaled(logits_Bc: Tensor, scale: float, work: Tensor) -> Tensor:
    """The block's logits over the temperature, in the workspace."""
    x_Bc = _shaped(work, logits_Bc.shape[0], logits_Bc.shape[1])
    x_Bc.copy_(logits_Bc)
    return x_Bc if scale == 1.0 else x_Bc.mul_(scale)


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first ``rows x columns`` numbers of a buffer, contiguous."""
    return buffer.view(-1)[: rows * columns].view(rows, columns)


def _targets_in(targets_T: Tensor, head: _Head, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Which tokens have their target in a chunk, and its column there."""
    local_T = targets_T - head.first
    rows = ((local_T >= start) & (local_T < end)).nonzero().squeeze(1)
    return rows, local_T[rows] - start


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_vH: Tensor, targets_T: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        count, device = hidden_TH.shape[0], hidden_TH.device
        sums = _Sums.empty(count, head.sum_dtype, device)
        work, kept = _workspace(head, hidden_TH), []
        keep = head.mode == "keep_logits"
        buffer = None if keep else _chunk_buffer(head, count, device)
        for start, end in head.chunks():
            room = _chunk_buffer(head, count, device) if keep else buffer
            logits_Tc = head.product(hidden_TH, start, end, _shaped(room, count, end - start))
            kept += [logits_Tc] if keep else []
            sums.add(logits_Tc, head.scale, work)
            rows, columns = _targets_in(targets_T, head, start, end)
            sums.target_T[rows] = logits_Tc[rows, columns].to(head.sum_dtype) * head.scale
        sums.combine(head.group)
        lse_T = sums.peak_T + torch.log(sums.total_T)
        logprobs_T = sums.target_T - lse_T
        entropy_T = torch.log(sums.total_T) - sums.moment_T / sums.total_T
        ctx.save_for_backward(hidden_TH, weight_vH, targets_T, lse_T, logprobs_T, entropy_T)
        ctx.head, ctx.kept = head, kept
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return None, None, None, None
        hidden_TH, weight_vH, targets_T, *saved = ctx.saved_tensors
        slope = _Slope(ctx.head, targets_T, *saved, *grads)
        head, count = ctx.head, hidden_TH.shape[0]
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=head.sum_dtype)
        grad_weight_vH = torch.empty_like(weight_vH)
        grad_weight_vH[head.valid :] = 0.0
        work = _workspace(head, hidden_TH)
        buffer = None if ctx.kept else _chunk_buffer(head, count, hidden_TH.device)
        for index, (start, end) in enumerate(head.chunks()):
            if ctx.kept:
                logits_Tc = ctx.kept[index]
            else:
                room = _shaped(buffer, count, end - start)
                logits_Tc = head.product(hidden_TH, start, end, room)
            grad_Tc = slope.of_chunk(logits_Tc, start, end, work, hidden_TH.dtype)
            torch.mm(grad_Tc.t(), hidden_TH, out=grad_weight_vH[start:end])
            _add_product(grad_hidden_TH, grad_Tc, weight_vH[start:end])
        ctx.kept = []  # they hold slopes now; a second backward pass computes logits again
        if dist.get_world_size(head.group) > 1:
            dist.all_reduce(grad_hidden_TH, group=head.group)
        return grad_hidden_TH.to(hidden_TH.dtype), grad_weight_vH, None, None


@dataclass(frozen=True)
class _Slope:
    """dL/dlogits, chunk by chunk; the fields are those of the module's formula, [T]."""

    head: _Head
    targets_T: Tensor
    lse_T: Tensor
    logprobs_T: Tensor
    entropy_T: Tensor
    grad_T: Tensor | None
    grad_entropy_T: Tensor | None

    def of_chunk(
        self, logits_Tc: Tensor, start: int, end: int, work: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The chunk's slope in the dtype of the products, in place of its logits if it fits."""
        in_place = logits_Tc.dtype == dtype
        slope_Tc = logits_Tc if in_place else torch.empty_like(logits_Tc, dtype=dtype)
        for rows in _row_blocks(logits_Tc):
            x_Bc = _scaled(logits_Tc[rows], self.head.scale, work)
            x_Bc.sub_(self.lse_T[rows, None])
            slope_Tc[rows] = self._spread(x_Bc, rows)
        rows, columns = _targets_in(self.targets_T, self.head, start, end)
        slope_Tc[rows, columns] = self._at_target(rows).to(dtype)
        return slope_Tc

    def _spread(self, log_p_Bc: Tensor, rows: slice) -> Tensor:
        """-g p - g_H p (log p + H), over the temperature; overwrites ``log_p_Bc``."""
        grad_T, grad_entropy_T = self.grad_T, self.grad_entropy_T
        if grad_entropy_T is None:
            assert grad_T is not None
            return log_p_Bc.exp_().mul_(grad_T[rows, None] * -self.head.scale)
        offset_T = grad_entropy_T[rows] * self.entropy_T[rows]
        offset_T = offset_T if grad_T is None else offset_T + grad_T[rows]
        p_Bc = torch.exp(log_p_Bc)
        log_p_Bc.mul_(grad_entropy_T[rows, None]).add_(offset_T[:, None])
        return log_p_Bc.mul_(p_Bc).mul_(-self.head.scale)

    def _at_target(self, rows: Tensor) -> Tensor:
        """The same at the target, where 1 - p is computed without cancellation."""
        logprobs_T, slope_T = self.logprobs_T[rows], torch.zeros_like(self.logprobs_T[rows])
        if self.grad_T is not None:
            slope_T -= self.grad_T[rows] * torch.expm1(logprobs_T)
        if self.grad_entropy_T is not None:
            surprise_T = logprobs_T + self.entropy_T[rows]
            slope_T -= self.grad_entropy_T[rows] * torch.exp(logprobs_T) * surprise_T
        return slope_T * self.head.scale


def _chunk_buffer(head: _Head, count: int, device: torch.device) -> Tensor:
    return torch.empty(count * min(CHUNK, head.valid), dtype=head.logits_dtype, device=device)


def _add_product(total_TH: Tensor, grad_Tc: Tensor, rows_cH: Tensor) -> None:
    """total += grad rows, accumulated in the total's dtype."""
    if grad_Tc.dtype == total_TH.dtype:
        total_TH.addmm_(grad_Tc, rows_cH)
    else:
        total_TH.add_(torch.mm(grad_Tc, rows_cH))


def linear_logprobs(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    targets_T: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    mode: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each next-token distribution, [T], nats.

    Both are differentiable with respect to hidden states and weight, at least float32.

    Args:
        hidden_TH: hidden states, the same on all ranks of the group; float32, float64 or bf16. The
            gradient that comes back is already summed over the group.
        weight_vH: this rank's rows of the output layer, in the dtype of the hidden states.
        targets_T: token ids in [0, vocab_size), int64, the same on all ranks of the group.
        vocab_size: the unpadded vocabulary.
        group: the tensor-parallel group, in whose rank order the vocabulary is split evenly.
        temperature: divides the logits.
        mode: see ``MODES``; without effect where the hidden states are float32 or float64.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    width = weight_vH.shape[0]
    first = dist.get_rank(group) * width
    head = _Head(
        weight_vH=weight_vH.detach(),
        first=first,
        valid=min(max(vocab_size - first, 0), width),
        group=group,
        scale=1.0 / temperature,
        mode=mode,
    )
    return _LinearLogProbs.apply(hidden_TH.contiguous(), weight_vH, targets_T, head)
