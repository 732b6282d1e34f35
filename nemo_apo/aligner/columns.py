"""The columns of ours, beside those of an objective, and of the host in its batches, named once.

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
# Columns of the host that are read.
TOKENS = "response_tokens"
MASK = "mask"


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
