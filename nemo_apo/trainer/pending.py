"""A rollout between its optimizer steps: what they share, and its form in a checkpoint.

What follows from the rollout alone (``batch``, ``parts``) is not stored but made again, to the
last bit. Axes: N sequences of the rollout, n of those whose group has finite log-probs.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.objectives import GroupBatch
from nemo_apo.record import KeptGroup
from nemo_apo.step_metrics import Stopwatch, Tally
from nemo_apo.trainer.rollouts import Rollouts

_KNOWN = "known_logprob_sums"


@dataclass
class PendingRollout:
    """A rollout under training; ``batch``, ``row_N`` and ``parts`` follow from the others.

    Attributes:
        rollouts: with every log-prob that was read before the first optimizer step.
        schedule: the schedule's next state.
        samples: completions drawn.
        metrics: of the rollout.
        tally: of the optimizer steps that are done.
        known_n: the last sequence log-probs known of each row of ``batch``, nats.
        alpha: this RL step's.
        watch: seconds spent so far, by metric.
        kept: groups for ``samples.jsonl``, written once the RL step is done.
        done: how many of ``parts`` are done.
        batch: the sequences in ``row_N``, settled; None if there are none.
        row_N: for every sequence of the rollout its row in ``batch``; -1 where the log-probs of
            its group are not all finite.
        parts: rows of the rollout that each optimizer step takes.
    """

    rollouts: Rollouts
    schedule: ScheduleState
    samples: int
    metrics: dict[str, float]
    tally: Tally
    known_n: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    alpha: float = math.nan
    watch: Stopwatch = field(default_factory=Stopwatch)
    kept: tuple[KeptGroup, ...] = ()
    done: int = 0
    batch: GroupBatch | None = None
    row_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    parts: list[Tensor] = field(default_factory=list)

    def stored(self) -> "StoredRollout":
        """What a checkpoint keeps of it."""
        columns = {name: value for name, value in vars(self.rollouts).items() if value is not None}
        # Columns may be views into one another, which a file cannot hold.
        tensors = {
            name: value.clone(memory_format=torch.contiguous_format)
            for name, value in {**columns, _KNOWN: self.known_n}.items()
        }
        numbers = {
            "alpha": self.alpha,
            "schedule": self.schedule.state_dict(),
            "samples": self.samples,
            "metrics": self.metrics,
            "tally": self.tally.state_dict(),
            "seconds": self.watch.seconds,
            "kept": [asdict(group) for group in self.kept],
            "done": self.done,
        }
        return StoredRollout(tensors, numbers)


@dataclass(frozen=True)
class StoredRollout:
    """A ``PendingRollout`` in a checkpoint: named tensors on the CPU, and plain numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    def restore(self) -> PendingRollout:
        """The rollout under training, but for what follows from it."""
        names, numbers = {field.name for field in fields(Rollouts)}, self.numbers
        columns = {name: value for name, value in self.tensors.items() if name in names}
        return PendingRollout(
            rollouts=Rollouts(**columns),
            known_n=self.tensors[_KNOWN].clone(),
            alpha=numbers["alpha"],
            schedule=ScheduleState.from_state_dict(numbers["schedule"]),
            samples=numbers["samples"],
            metrics=dict(numbers["metrics"]),
            tally=Tally.from_state_dict(numbers["tally"]),
            watch=Stopwatch(dict(numbers["seconds"])),
            kept=tuple(KeptGroup.from_dict(group) for group in numbers["kept"]),
            done=numbers["done"],
        )


def optimizer_step_rows(
    group_index_N: Tensor, groups: int, mini_batches: int, epochs: int, seed: int
) -> list[Tensor]:
    """Rows of each optimizer step: whole groups, shuffled anew in every pass.

    Args:
        group_index_N: group of each sequence, in [0, groups).
        groups: number of groups.
        mini_batches, epochs: optimizer steps of a pass, and passes.
        seed: of the order.
    """
    shuffle = torch.Generator().manual_seed(seed)
    parts = [
        part_G
        for _ in range(epochs)
        for part_G in torch.tensor_split(torch.randperm(groups, generator=shuffle), mini_batches)
        if part_G.numel() > 0
    ]
    return [torch.isin(group_index_N, part_G).nonzero().squeeze(1) for part_G in parts]
