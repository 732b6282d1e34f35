"""``nemo_apo.parallel.logprob_chunks`` as two Triton kernels: a chunk is read once in each pass.

Compiled for a GPU; with TRITON_INTERPRET=1 in the environment before the first import they run
slowly on a CPU, which is how they are tested without a GPU. Axes: T tokens, c of a chunk.
"""

import triton
import triton.language as tl
from torch import Tensor

from nemo_apo.parallel.logprob_chunks import Slope, Sums

# Columns that a program holds at once.
_BLOCK = 2048


@triton.jit
def _add_chunk(
    logits_Tc,
    columns_T,
    peak_T,
    total_T,
    moment_T,
    target_T,
    stride,
    width,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token: an online softmax over the chunk's columns."""
    token = tl.program_id(0).to(tl.int64)
    row = logits_Tc + token * stride
    dtype = peak_T.dtype.element_ty
    peak = tl.load(peak_T + token)
    total = tl.load(total_T + token)
    moment = tl.load(moment_T + token)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(row + column, mask=inside, other=float("-inf")).to(dtype) * SCALE
        highest = tl.maximum(peak, tl.max(x, axis=0))
        # Before the first columns the sums are 0 and the peak is -inf: nothing to shift.
        shift = tl.where(total > 0.0, peak - highest, 0.0)
        moment = tl.exp(shift) * (moment + shift * total)
        total = tl.exp(shift) * total
        peak = highest
        below = tl.where(inside, x - peak, 0.0)
        weight = tl.where(inside, tl.exp(below), 0.0)
        total += tl.sum(weight, axis=0)
        moment += tl.sum(weight * below, axis=0)
    tl.store(peak_T + token, peak)
    tl.store(total_T + token, total)
    tl.store(moment_T + token, moment)
    column = tl.load(columns_T + token)
    held = (column >= 0) & (column < width)
    target = tl.load(row + column, mask=held, other=0.0).to(dtype) * SCALE
    tl.store(target_T + token, target, mask=held)


@triton.jit
def _slope_of_chunk(
    out_Tc,
    logits_Tc,
    columns_T,
    lse_T,
    constant_T,
    linear_T,
    at_target_T,
    out_stride,
    stride,
    width,
    SCALE: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = lse_T.dtype.element_ty
    logits = tl.load(logits_Tc + token * stride + column, mask=inside, other=0.0)
    log_p = logits.to(dtype) * SCALE - tl.load(lse_T + token)
    factor = tl.load(constant_T + token)
    if HAS_LINEAR:
        factor += tl.load(linear_T + token) * log_p
    slope = tl.exp(log_p) * factor
    is_target = column == tl.load(columns_T + token)
    slope = tl.where(is_target, tl.load(at_target_T + token), slope)
    out = out_Tc + token * out_stride + column
    tl.store(out, slope.to(out_Tc.dtype.element_ty), mask=inside)


class TritonChunks:
    """See ``nemo_apo.parallel.logprob_chunks.Chunks``."""

    def add(self, sums: Sums, logits_Tc: Tensor, columns_T: Tensor, scale: float) -> None:
        tokens, width = logits_Tc.shape
        if tokens == 0:
            return
        _add_chunk[(tokens,)](
            logits_Tc,
            columns_T,
            sums.peak_T,
            sums.total_T,
            sums.moment_T,
            sums.target_T,
            logits_Tc.stride(0),
            width,
            SCALE=scale,
            BLOCK=_BLOCK,
        )

    def write_slope(
        self, out_Tc: Tensor, logits_Tc: Tensor, columns_T: Tensor, slope: Slope, scale: float
    ) -> None:
        tokens, width = logits_Tc.shape
        if tokens == 0:
            return
        has_linear = slope.linear_T is not None
        _slope_of_chunk[(tokens, triton.cdiv(width, _BLOCK))](
            out_Tc,
            logits_Tc,
            columns_T,
            slope.lse_T,
            slope.constant_T,
            slope.linear_T if has_linear else slope.constant_T,
            slope.at_target_T,
            out_Tc.stride(0),
            logits_Tc.stride(0),
            width,
            SCALE=scale,
            HAS_LINEAR=has_linear,
            BLOCK=_BLOCK,
        )
