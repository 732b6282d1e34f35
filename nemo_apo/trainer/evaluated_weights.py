"""Weights that exist already, of a run or of a configuration, evaluated by themselves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_apo import record
from nemo_apo.config import Config, ConfigError
from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint_search import CheckpointError, checkpoint_folders, order, verify
from nemo_apo.trainer.engines.by_name import check_engine
from nemo_apo.trainer.evaluation import Evaluation, figures
from nemo_apo.trainer.examination import Examination, examine
from nemo_apo.trainer.loop import build_policy, set_threads
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.ranks import ranks
from nemo_apo.trainer.retention import METRICS
from nemo_apo.trainer.same_data import check_same_data
from nemo_apo.trainer.sealed_folder import DamagedFolder, read_manifest

LATEST, BEST = "latest", "best"


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and what it is of.

    Attributes:
        source: where the weights were read, for a person.
        step: RL step of the checkpoint; None where it states none.
        layout: where the ranks stood, for a person.
        seconds: of sampling and grading.
    """

    seen: Examination
    figures: Evaluation
    source: str
    step: int | None
    layout: Layout
    seconds: float


def chosen_checkpoint(run_folder: Path, which: str, metric: str) -> Path:
    """The folder of one of a run's checkpoints; nothing is verified.

    Args:
        run_folder: the run's.
        which: "latest", "best" or the number of an RL step.
        metric: by which one is best, a name of ``nemo_apo.record``.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    root = run_folder / record.CHECKPOINT_DIR
    folders = checkpoint_folders(root)
    if not folders:
        raise ConfigError(f"{run_folder}: holds no checkpoint")
    if which == LATEST:
        return folders[0]
    if which == BEST:
        return _best(folders, metric)
    steps = {order(folder)[0]: folder for folder in reversed(folders)}
    if not which.isdecimal() or int(which) not in steps:
        known = ", ".join(map(str, steps))
        raise ConfigError(
            f"--checkpoint {which}: must be latest, best or a step of {root}, which are {known}"
        )
    return steps[int(which)]


def _best(folders: Sequence[Path], metric: str) -> Path:
    """The folder with the highest metric, the newer of two equal ones; ``folders`` newest first."""
    scores: dict[Path, float] = {}
    for folder in folders:
        try:
            stated = read_manifest(folder).about.get(METRICS, {})
        except DamagedFolder as fault:
            raise ConfigError(f"--checkpoint best: {folder} is damaged: {fault}") from None
        if metric in stated:
            scores[folder] = stated[metric]
    if not scores:
        raise ConfigError(f"--checkpoint best: none of {folders[0].parent} states {metric}")
    return max(scores, key=scores.__getitem__)


def evaluate_weights(config: Config, folder: Path | None) -> Evaluated:
    """Evaluate a checkpoint, or without one what a run of the configuration would start from.

    Args:
        config: validated; how the ranks are laid out, and what is asked of the policy.
        folder: a checkpoint in any layout, whole or weights alone.

    Raises:
        ConfigError: if the rollout engine cannot run here.
        CheckpointError: on all ranks, if it is damaged or of another model.
        GradingBroken: on all ranks, if one of them has no worker.
        RanksLost: if some ranks no longer answer.
        StoppedEarly: on all ranks, after a signal or ``run.max_time``.
        TrainingStopped: on all ranks, if they have read different data.
    """
    set_threads(config.run)
    check_engine(config)
    with ranks(config) as (layout, stop):
        check_same_data(config.task)
        load = config.warm_start.load
        policy = build_policy(config, layout, weights_follow=bool(folder or load))
        step = _load(config, folder, policy)
        began = time.perf_counter()
        seen = examine(policy, config, config.task, stop)
        seconds = time.perf_counter() - began
    source = str(folder or load or config.model.path)
    return Evaluated(seen, figures(seen), source, step, layout, seconds)


def _load(config: Config, folder: Path | None, policy: Policy) -> int | None:
    """Take the weights to evaluate; the RL step that they are of."""
    if folder is None:
        if config.warm_start.load is not None:
            checkpoint.load_weights(Path(config.warm_start.load), policy)
        return None
    try:
        found = verify(folder)
    except DamagedFolder as fault:
        raise CheckpointError(f"{folder} is damaged: {fault}") from None
    checkpoint.load_for_evaluation(found, policy, config)
    return found.manifest.about.get("step")
