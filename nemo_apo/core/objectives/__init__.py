"""Policy objectives: one file per family, all by *weigh, split, sum* (see ``interface``)."""

from nemo_apo.core.objectives.adpo import AdpoRanking, AdpoSoftmax
from nemo_apo.core.objectives.apo import Apo
from nemo_apo.core.objectives.interface import (
    Columns,
    GroupBatch,
    Objective,
    TokenInputs,
    Weighing,
)
from nemo_apo.core.objectives.ratio import Cispo, ClippedRatio, Gspo, Sapo
from nemo_apo.core.objectives.regularizers import Regularizers

# An objective by name, with the defaults of its paper (or, where the paper has none, ours).
OBJECTIVES: dict[str, Objective] = {
    "apo": Apo(),
    "adpo_softmax": AdpoSoftmax(),
    "adpo_plackett_luce": AdpoRanking(name="adpo_plackett_luce"),
    "adpo_pairwise": AdpoRanking(name="adpo_pairwise"),
    "grpo": ClippedRatio(name="grpo"),
    "dr_grpo": ClippedRatio(name="dr_grpo", advantages="centered", aggregation="constant"),
    "dapo": ClippedRatio(name="dapo", aggregation="group_token_mean", clip_high=0.28),
    "gspo": Gspo(),
    "cispo": Cispo(),
    "sapo": Sapo(),
}

__all__ = [
    "OBJECTIVES",
    "AdpoRanking",
    "AdpoSoftmax",
    "Apo",
    "Cispo",
    "ClippedRatio",
    "Columns",
    "GroupBatch",
    "Gspo",
    "Objective",
    "Regularizers",
    "Sapo",
    "TokenInputs",
    "Weighing",
]
