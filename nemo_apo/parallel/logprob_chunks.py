"""What is done to a chunk of logits besides the matrix products, in plain torch.

Forward takes a chunk into running sums, backward turns it into the slope of the loss. This is the
way of a CPU, and the reference of ``logprob_chunks_triton``, the way of a GPU. The formulas are in
``nemo_apo.parallel.logprobs``. Axes: T tokens, c vocabulary rows of a chunk, B tokens of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Tokens whose part of a chunk is worked on at once: it stays in a CPU core's cache.
_CPU_ROWS = 64


@dataclass
class Sums:
    """Running sums over the vocabulary, [T] each, at least float32.

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
    def empty(cls, count: int, dtype: torch.dtype, device: torch.device) -> "Sums":
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

    @property
    def lse_T(self) -> Tensor:
        """Log of the sum of exp(x)."""
        return self.peak_T + torch.log(self.total_T)

    @property
    def entropy_T(self) -> Tensor:
        return torch.log(self.total_T) - self.moment_T / self.total_T


@dataclass(frozen=True)
class Slope:
    """The loss's slope in the logits before the temperature, in terms of log p = x - lse.

    It is p (constant + linear log p), and ``at_target_T`` at the target, where 1 - p would cancel.

    Attributes:
        lse_T, constant_T, at_target_T: [T].
        linear_T: [T]; None where the loss does not depend on the entropy.
    """

    lse_T: Tensor
    constant_T: Tensor
    linear_T: Tensor | None
    at_target_T: Tensor

    @classmethod
    def of(
        cls,
        lse_T: Tensor,
        logprobs_T: Tensor,
        entropy_T: Tensor,
        grad_T: Tensor | None,
        grad_entropy_T: Tensor | None,
        scale: float,
    ) -> "Slope":
        """From what the forward pass saved and the slopes in log-prob and entropy."""
        constant_T, target_T = torch.zeros_like(lse_T), torch.zeros_like(lse_T)
        if grad_T is not None:
            constant_T = constant_T - scale * grad_T
            target_T = target_T - scale * grad_T * torch.expm1(logprobs_T)
        if grad_entropy_T is None:
            return cls(lse_T, constant_T, None, target_T)
        linear_T = -scale * grad_entropy_T
        constant_T = constant_T + linear_T * entropy_T
        target_T = target_T + linear_T * torch.exp(logprobs_T) * (logprobs_T + entropy_T)
        return cls(lse_T, constant_T, linear_T, target_T)


class Chunks(Protocol):
    """A way to work on the chunks of one forward or backward pass.

    ``columns_T`` is the column of each token's target in the chunk, and outside of it where the
    chunk does not hold the target; ``scale`` is 1 / temperature.
    """

    def add(self, sums: Sums, logits_Tc: Tensor, columns_T: Tensor, scale: float) -> None:
        """Take a chunk into the sums, the target's logit included."""
        ...

    def write_slope(
        self, out_Tc: Tensor, logits_Tc: Tensor, columns_T: Tensor, slope: Slope, scale: float
    ) -> None:
        """Write a chunk's slope, in the dtype of ``out_Tc``, which may be the logits themselves."""
        ...


class TorchChunks:
    """The chunks block by block of tokens, in two work buffers that are used again."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for up to ``count`` tokens and ``width`` columns; ``dtype`` of the sums."""
        self._rows = max(1, count if device.type == "cuda" else min(count, _CPU_ROWS))
        self._work = torch.empty(2, self._rows * width, dtype=dtype, device=device)

    def add(self, sums: Sums, logits_Tc: Tensor, columns_T: Tensor, scale: float) -> None:
        peak_T = logits_Tc.amax(dim=-1).to(sums.peak_T.dtype)
        sums.move_peak(torch.maximum(sums.peak_T, peak_T if scale == 1.0 else peak_T * scale))
        for rows in self._blocks(logits_Tc):
            x_Bc, exp_Bc = self._scaled(logits_Tc[rows], scale)
            x_Bc.sub_(sums.peak_T[rows, None])
            torch.exp(x_Bc, out=exp_Bc)
            sums.total_T[rows] += exp_Bc.sum(dim=-1)
            sums.moment_T[rows] += torch.linalg.vecdot(exp_Bc, x_Bc)
        rows, columns = _held(columns_T, logits_Tc.shape[1])
        sums.target_T[rows] = logits_Tc[rows, columns].to(sums.target_T.dtype) * scale

    def write_slope(
        self, out_Tc: Tensor, logits_Tc: Tensor, columns_T: Tensor, slope: Slope, scale: float
    ) -> None:
        for rows in self._blocks(logits_Tc):
            log_p_Bc, p_Bc = self._scaled(logits_Tc[rows], scale)
            log_p_Bc.sub_(slope.lse_T[rows, None])
            torch.exp(log_p_Bc, out=p_Bc)
            if slope.linear_T is None:
                p_Bc.mul_(slope.constant_T[rows, None])
            else:
                log_p_Bc.mul_(slope.linear_T[rows, None]).add_(slope.constant_T[rows, None])
                p_Bc.mul_(log_p_Bc)
            out_Tc[rows] = p_Bc
        rows, columns = _held(columns_T, logits_Tc.shape[1])
        out_Tc[rows, columns] = slope.at_target_T[rows].to(out_Tc.dtype)

    def _blocks(self, logits_Tc: Tensor) -> Iterator[slice]:
        for start in range(0, logits_Tc.shape[0], self._rows):
            yield slice(start, start + self._rows)

    def _scaled(self, logits_Bc: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The block's logits over the temperature in one buffer, and the other buffer."""
        x_Bc, other_Bc = (room[: logits_Bc.numel()].view(logits_Bc.shape) for room in self._work)
        x_Bc.copy_(logits_Bc)
        return x_Bc if scale == 1.0 else x_Bc.mul_(scale), other_Bc


def _held(columns_T: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Tokens whose target a chunk holds, and its column there."""
    rows = ((columns_T >= 0) & (columns_T < width)).nonzero().squeeze(1)
    return rows, columns_T[rows]
