"""The columns of an objective that travel with each sequence through a host's batches.

Of this package only ``core`` is needed: a host's workers import this with the loss. Axes: B
sequences of a micro-batch, N of the batch that is cut.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from nemo_apo.core.objectives import Columns

COEFFICIENT = "apo_coefficient"
ADVANTAGE = "apo_advantage"
TOKEN_WEIGHT = "apo_token_weight"


def attach(batch: MutableMapping[str, Tensor], columns: Columns, device: torch.device) -> None:
    """Put an objective's columns into a batch of the host, on the device where that is."""
    columns = columns.to(device)
    batch[COEFFICIENT] = columns.coefficient_N
    batch[ADVANTAGE] = columns.advantage_N
    batch[TOKEN_WEIGHT] = columns.token_weight_N


def attached(micro_batch: Mapping[str, Tensor], like: Tensor) -> Columns:
    """An objective's columns of a micro-batch, on the device of ``like``."""
    columns = Columns(micro_batch[COEFFICIENT], micro_batch[ADVANTAGE], micro_batch[TOKEN_WEIGHT])
    return columns.to(like.device)
