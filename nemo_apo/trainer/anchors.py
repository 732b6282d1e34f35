"""Weights that the trainer remembers: the policy at the start of RL, and the anchor's.

A frozen copy is kept where something reads it and nowhere else. Anchor kinds are those of
``nemo_apo.core.anchoring.ANCHORS``; "old" needs no copy, its log-probs are those of the rollout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_apo.config import AnchorConfig
from nemo_apo.trainer.policy import Policy

# The fields of RememberedWeights, as they are named in a checkpoint.
ROLES = ("reference", "anchor")


@dataclass
class RememberedWeights:
    """Copies of this rank's weights, by role.

    Attributes:
        reference: the policy at the start of RL, or None where nothing reads it.
        anchor: the moving or lagged anchor, or None for the other kinds.
    """

    reference: list[Tensor] | None = None
    anchor: list[Tensor] | None = None

    @classmethod
    def at_start(
        cls, policy: Policy, anchor: AnchorConfig, needs_reference: bool
    ) -> "RememberedWeights":
        """Copies of the policy as it stands at the start of RL."""
        keeps_reference = needs_reference or anchor.name == "reference"
        moves = anchor.name in ("ema", "lagged")
        return cls(
            reference=policy.copy_weights() if keeps_reference else None,
            anchor=policy.copy_weights() if moves else None,
        )

    @torch.no_grad()
    def advance(self, policy: Policy, anchor: AnchorConfig, steps_done: int) -> None:
        """Let a moving anchor follow the policy after an RL step (``steps_done`` counts it)."""
        if anchor.name == "ema":
            assert self.anchor is not None
            for kept, parameter in zip(self.anchor, policy.parameters(), strict=True):
                kept.lerp_(parameter.detach(), 1.0 - anchor.decay)
        if anchor.name == "lagged" and steps_done % anchor.refresh_every == 0:
            self.anchor = policy.copy_weights()
