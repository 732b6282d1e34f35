"""What a rollout must be, whichever host sampled it.

Axes: N sequences of the global rollout, S tokens.
"""

import torch
from torch import Tensor

from nemo_apo.core.groups import Groups


class RolloutError(ValueError):
    """A rollout that cannot be trained on as groups; the message says which rule it breaks."""


def foreign_prompts(prompts_NS: Tensor, lengths_N: Tensor, groups: Groups) -> Tensor:
    """Sequences whose prompt is not that of one of their group, bool [N].

    Only the prompt's own tokens count: what a micro-batch was padded with depends on its width.
    """
    rows_N = torch.arange(len(prompts_NS), device=groups.index_N.device)
    one_N = groups.spread(groups.max(rows_N))
    positions_S = torch.arange(prompts_NS.shape[1], device=prompts_NS.device)
    inside_NS = positions_S[None, :] < lengths_N.to(prompts_NS.device)[:, None]
    differs_N = ((prompts_NS != prompts_NS[one_N]) & inside_NS).any(dim=1)
    return differs_N | (lengths_N != lengths_N[one_N])
