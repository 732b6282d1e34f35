"""Which checkpoints of a run are kept: the newest ones, and the best by a metric."""

from dataclasses import dataclass
from pathlib import Path

from nemo_apo.trainer.checkpoint_search import checkpoint_folders, order
from nemo_apo.trainer.durable_files import remove_folder
from nemo_apo.trainer.sealed_folder import DamagedFolder, read_manifest

# Name of a checkpoint's metrics in what its manifest says about it.
METRICS = "metrics"
# Whether it was made between two optimizer steps, with the rollout that they share.
IN_ROLLOUT = "in_rollout"


@dataclass(frozen=True)
class Kept:
    """How many checkpoints stay.

    Attributes:
        last: newest ones; None keeps all.
        best: further ones, by the highest value of ``metric``; the newer of two equal ones.
        metric: a name of ``nemo_apo.record``. A checkpoint without it is never among the best.
    """

    last: int | None
    best: int
    metric: str


def prune(root: Path, newest: Path, kept: Kept) -> list[Path]:
    """Remove what need not be kept, after ``newest`` has been sealed. Returns what was removed.

    ``newest``, the only one known to be whole, always stays.
    """
    removed = [folder for folder in surplus(root, kept) if folder != newest]
    for folder in removed:
        remove_folder(folder)
    return removed


def surplus(root: Path, kept: Kept) -> list[Path]:
    """Checkpoints that are beyond what is kept, newest first."""
    folders = checkpoint_folders(root)
    latest_attempt = {_moment(folder): folder for folder in reversed(folders)}
    current = [folder for folder in folders if latest_attempt[_moment(folder)] == folder]
    staying = set(current if kept.last is None else current[: kept.last])
    scores = {
        folder: score for folder in current if (score := _score(folder, kept.metric)) is not None
    }
    ranked = sorted(scores, key=lambda folder: (scores[folder], order(folder)), reverse=True)
    staying.update(ranked[: kept.best])
    return [folder for folder in folders if folder not in staying]


def _moment(folder: Path) -> tuple[int, bool]:
    """The step of a checkpoint, and whether it was made within the rollout that follows it."""
    try:
        return order(folder)[0], bool(read_manifest(folder).about.get(IN_ROLLOUT))
    except DamagedFolder:
        return order(folder)[0], False


def _score(folder: Path, metric: str) -> float | None:
    try:
        return float(read_manifest(folder).about[METRICS][metric])
    except (DamagedFolder, KeyError):
        return None
