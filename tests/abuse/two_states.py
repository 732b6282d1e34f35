"""Two states of one training, A after its first step and B after its second, and their saves.

What is on disk after any abuse must load as A or as B, bit for bit, and never as a mixture.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from nemo_apo.config import AnchorConfig, Config
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint import TrainerState
from nemo_apo.trainer.checkpoint_search import newest_verified
from tests.parallel.ranks import run_ranks
from tests.trainer.resumed_runs import moments
from tests.trainer.tiny_runs import Training, begin, bits_equal, tiny_config

STEP = {"A": 1, "B": 2}


def abuse_config(**run: object) -> Config:
    """A configuration whose checkpoints hold weights of every role; keeps one checkpoint."""
    config = tiny_config(anchor=AnchorConfig(name="ema", decay=0.6))
    return replace(config, run=replace(config.run, **{"keep_last": 1, **run}))


def initialize(config: Config) -> Layout:
    return parallel_layout.initialize(config.parallel, config.run.seed)


def at(step: int, config: Config, layout: Layout | None = None) -> Training:
    """The training after a number of steps."""
    training = begin(config, layout)
    training.run(step)
    return training


def state_of(step: int) -> TrainerState:
    return TrainerState(
        step=step,
        schedule=ScheduleState(),
        diagnostics=DiagnosticsState(),
        optimizer_steps=2 * step,
    )


def save_at(root: Path, training: Training, step: int) -> Path:
    """Save a training as it stands."""
    return checkpoint.save(
        root, training.policy, training.remembered, state_of(step), training.config, {}
    )


def everything(training: Training) -> list[Tensor]:
    """Weights, optimizer and remembered weights of this rank."""
    remembered = training.remembered
    return [
        *training.policy.copy_weights(),
        *moments(training.policy),
        *(value.clone() for value in [*(remembered.reference or []), *(remembered.anchor or [])]),
    ]


def save_a(root: Path, config: Config, ranks: int = 1) -> None:
    """Make a folder that holds a checkpoint of A."""

    def work() -> None:
        save_at(root, at(STEP["A"], config, initialize(config)), STEP["A"])

    run_ranks(ranks, work)


def copies(original: Path, count: int, tag: str = "try") -> list[Path]:
    """Copies of a folder of checkpoints, one for each try."""
    folders = [original.with_name(f"{original.name}_{tag}_{number}") for number in range(count)]
    for folder in folders:
        shutil.copytree(original, folder, symlinks=True)
    return folders


@dataclass(frozen=True)
class Outcome:
    """What became of a folder: which state it loads as, and what is left after another save.

    Attributes:
        loads: "A" or "B".
        damaged: names of checkpoints that were passed over.
        left: names in the folder after another save.
    """

    loads: str
    damaged: tuple[str, ...]
    left: tuple[str, ...]


def outcomes(roots: list[Path], config: Config, ranks: int = 1) -> list[Outcome]:
    """Load each folder's newest checkpoint, say which state it is, and save once more.

    Raises:
        RankFailure: if a folder loads as neither of the two states, or not at all.
    """

    def work() -> list[Outcome]:
        layout = initialize(config)
        states = {name: everything(at(step, config, layout)) for name, step in STEP.items()}
        assert not bits_equal(states["A"], states["B"])
        return [_outcome(root, states, config, layout) for root in roots]

    return run_ranks(ranks, work, timeout_s=600.0)[0]


def _outcome(
    root: Path, states: dict[str, list[Tensor]], config: Config, layout: Layout
) -> Outcome:
    training = begin(config, layout)
    found = newest_verified(root)
    assert found is not None, f"no checkpoint is left in {root}"
    state, _ = checkpoint.load(found.newest, training.policy, training.remembered, config)
    loaded = everything(training)
    same = [name for name, tensors in states.items() if bits_equal(loaded, tensors)]
    assert [STEP[name] for name in same] == [state.step], f"{root} holds a mixture"
    save_at(root, training, 3)
    left = tuple(sorted(path.name for path in root.iterdir()))
    return Outcome(same[0], tuple(folder.name for folder, _ in found.damaged), left)
