"""The columns that travel with each sequence through the host's batches, named once.

Axes: B sequences of a micro-batch, N of an optimizer step or rollout, T tokens (targets), M of an
optimizer step (over all ranks), m of those of them that are trained on, b of this rank's part.
"""

from collections.abc import Mapping

from torch import Tensor

from nemo_apo.core.objectives import Columns, TokenInputs
from nemo_apo.plugin.settled import spread_columns

# Which prompt of the rollout a sequence answers; from the data set's index, at sampling.
GROUP_ID = "apo_group_id"
# Position of a sequence in the reordered global rollout.
ROW = "apo_row"
OLD_LOGPROBS = "apo_old_logprobs"
REFERENCE_LOGPROBS = "apo_reference_logprobs"
COEFFICIENT = "apo_coefficient"
ADVANTAGE = "apo_advantage"
TOKEN_WEIGHT = "apo_token_weight"
# Columns of the host that are read.
TOKENS = "response_tokens"
MASK = "mask"


def attach(batch: dict[str, Tensor], columns: Columns) -> None:
    """Put an objective's columns into a host batch, on the batch's device."""
    columns = columns.to(batch[TOKENS].device)
    batch[COEFFICIENT] = columns.coefficient_N
    batch[ADVANTAGE] = columns.advantage_N
    batch[TOKEN_WEIGHT] = columns.token_weight_N


def attached(micro_batch: Mapping[str, Tensor], like: Tensor) -> Columns:
    """An objective's columns of a micro-batch, on the device of ``like``."""
    columns = Columns(micro_batch[COEFFICIENT], micro_batch[ADVANTAGE], micro_batch[TOKEN_WEIGHT])
    return columns.to(like.device)


def token_inputs(
    micro_batch: Mapping[str, Tensor], logprobs_BT: Tensor, entropy_BT: Tensor
) -> TokenInputs:
    """What a micro-batch knows of its tokens, on the device of its log-probs."""
    device = logprobs_BT.device
    reference_BT = micro_batch.get(REFERENCE_LOGPROBS)
    return TokenInputs(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=micro_batch[OLD_LOGPROBS].to(device),
        mask_BT=micro_batch[MASK].to(device).bool(),
        reference_logprobs_BT=None if reference_BT is None else reference_BT.to(device),
        entropy_BT=entropy_BT,
    )


def rank_columns(columns_m: Columns, trained_M: Tensor, rank: int, ranks: int) -> Columns:
    """A rank's slice of an optimizer step's columns; sequences that are not trained weigh nothing.

    Args:
        columns_m: of the sequences that are trained on.
        trained_M: which sequences of the optimizer step these are, bool.
        rank, ranks: among the data-parallel ranks, whose parts lie side by side.
    """
    share = len(trained_M) // ranks
    mine = slice(rank * share, (rank + 1) * share)
    return spread_columns(columns_m, trained_M).map(lambda column_M: column_M[mine])
