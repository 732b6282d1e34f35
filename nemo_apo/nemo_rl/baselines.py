"""The rewards of a rollout, which the host's trainer does not hand to its policy.

``policy.train`` gets advantages, reward less the mean of its group, and so cannot know the mean
reward that a schedule looks at. The host logs those means just before it trains: the logger that it
is given takes note of them. Axes: N sequences of the rollout.
"""

from typing import Any

import torch
from torch import Tensor

from nemo_apo.plugin.rollout import RolloutError

# The histogram that holds them, one per sequence.
HISTOGRAM = "train/baseline_reward/histogram"


class Baselines:
    """Mean rewards of the groups of the rollout that is about to be trained on."""

    def __init__(self) -> None:
        self._noted_N: Tensor | None = None

    def note(self, baseline_N: Any) -> None:
        """Take in the means, one per sequence."""
        self._noted_N = torch.as_tensor(baseline_N, dtype=torch.float32).flatten().clone()

    def rewards(self, advantages_N: Tensor) -> Tensor:
        """Rewards [N] float64 of the rollout whose means were noted last; each is used once.

        Raises:
            RolloutError: if none were noted since, or they are of another rollout.
        """
        noted_N, self._noted_N = self._noted_N, None
        if noted_N is None:
            raise RolloutError(
                f"the host has not logged {HISTOGRAM} before training, so the rewards are not "
                "known: hand ApoLogger(logger, baselines) to grpo_train"
            )
        if noted_N.shape != advantages_N.shape:
            raise RolloutError(
                f"the host has logged {len(noted_N)} group means for {len(advantages_N)} sequences"
            )
        # In the host's own precision: what it took away there comes back exactly, or to rounding.
        return (advantages_N.float() + noted_N).double()


class ApoLogger:
    """The host's logger, which it stands for in every respect, with an ear for ``baselines``."""

    def __init__(self, logger: Any, baselines: Baselines) -> None:
        self._logger = logger
        self._baselines = baselines

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name)

    def log_histogram(self, histogram: Any, step: int, name: str) -> None:
        """As the host's."""
        if name == HISTOGRAM:
            self._baselines.note(histogram)
        self._logger.log_histogram(histogram, step, name)
