"""Sequences on their way through the model, with the columns that a pass needs.

Axes: B sequences, T tokens (the columns of ``nemo_apo.trainer.rollouts``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_apo.core.objectives import Columns


@dataclass(frozen=True)
class MicroBatch:
    """B sequences, with whatever columns a pass needs; [B, T] columns are those of the targets."""

    inputs_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    columns: Columns | None = None
    old_logprobs_BT: Tensor | None = None
    reference_logprobs_BT: Tensor | None = None
    importance_BT: Tensor | None = None

    @classmethod
    def of(cls, tokens_BS: Tensor, mask_BT: Tensor, **columns: Any) -> "MicroBatch":
        """From whole sequences, S = T + 1 tokens each."""
        return cls(tokens_BS[:, :-1], tokens_BS[:, 1:], mask_BT, **columns)

    @property
    def rows(self) -> int:
        return self.inputs_BT.shape[0]

    @property
    def width(self) -> int:
        return self.inputs_BT.shape[1]

    def select(self, rows: Tensor) -> "MicroBatch":
        """Some of the sequences."""
        columns = None if self.columns is None else self.columns.select(rows)
        return self._map_tokens(lambda values_BT: values_BT[rows], columns)

    def padded(self, multiple: int) -> "MicroBatch":
        """With a width that is a multiple of a number; what is added is no completion token."""
        more = -self.width % multiple
        return self._map_tokens(lambda values_BT: pad(values_BT, (0, more)), self.columns)

    def trimmed(self, width: int) -> "MicroBatch":
        """Without the columns from ``width`` on."""
        return self._map_tokens(lambda values_BT: values_BT[:, :width], self.columns)

    def at(self, positions_t: Tensor) -> "MicroBatch":
        """Some of the tokens of every sequence."""
        return self._map_tokens(lambda values_BT: values_BT[:, positions_t], self.columns)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device; float64 columns stay float64."""
        columns = None if self.columns is None else self.columns.to(device)
        return self._map_tokens(lambda values_BT: values_BT.to(device), columns)

    def _map_tokens(
        self, change: Callable[[Tensor], Tensor], columns: Columns | None
    ) -> "MicroBatch":
        def changed(values_BT: Tensor | None) -> Tensor | None:
            return None if values_BT is None else change(values_BT)

        return MicroBatch(
            inputs_BT=change(self.inputs_BT),
            targets_BT=change(self.targets_BT),
            mask_BT=change(self.mask_BT),
            columns=columns,
            old_logprobs_BT=changed(self.old_logprobs_BT),
            reference_logprobs_BT=changed(self.reference_logprobs_BT),
            importance_BT=changed(self.importance_BT),
        )
