import json
from pathlib import Path

import pytest

from nemo_apo.trainer.checkpoint_search import checkpoint_folders, free_name
from nemo_apo.trainer.durable_files import settle_file
from nemo_apo.trainer.retention import Kept, prune, surplus
from nemo_apo.trainer.sealed_folder import MANIFEST_FILE, seal

ACCURACY = "eval/accuracy"


def make(root: Path, accuracies: dict[str, float | None]) -> None:
    """Checkpoints by name, with their accuracy."""
    for name, accuracy in accuracies.items():
        folder = root / name
        folder.mkdir()
        (folder / "file").write_text(name)
        metrics = {} if accuracy is None else {ACCURACY: accuracy}
        seal(folder, {"file": settle_file(folder / "file")}, {"metrics": metrics})


def make_in_rollout(root: Path, name: str) -> None:
    """A checkpoint made within a rollout."""
    folder = root / name
    folder.mkdir()
    (folder / "file").write_text(name)
    about = {"metrics": {}, "in_rollout": True}
    seal(folder, {"file": settle_file(folder / "file")}, about)


@pytest.mark.parametrize(
    ("kept", "gone"),
    [
        (Kept(None, 0, ACCURACY), []),
        (Kept(1, 1, ACCURACY), ["step_000001"]),
        (Kept(1, 0, ACCURACY), ["step_000002", "step_000001"]),
    ],
)
def test_a_checkpoint_within_a_rollout_does_not_stand_for_the_one_before_it(
    kept: Kept, gone: list[str], tmp_path: Path
) -> None:
    make(tmp_path, {"step_000001": 0.1, "step_000002": 0.9})
    make_in_rollout(tmp_path, "step_000002.1")
    assert names(surplus(tmp_path, kept)) == gone
    # A later one of the same rollout replaces it.
    make_in_rollout(tmp_path, "step_000002.2")
    assert "step_000002.1" in names(surplus(tmp_path, kept))


def names(folders: list[Path]) -> list[str]:
    return [folder.name for folder in folders]


FOUR = {"step_000001": 0.9, "step_000002": 0.1, "step_000003": 0.9, "step_000004": 0.2}


@pytest.mark.parametrize(
    ("last", "best", "gone"),
    [
        (None, 0, []),
        (4, 0, []),
        (2, 0, ["step_000002", "step_000001"]),
        (1, 1, ["step_000002", "step_000001"]),
        (1, 2, ["step_000002"]),
        (1, 9, []),
    ],
)
def test_the_newest_and_the_best_stay(
    last: int | None, best: int, gone: list[str], tmp_path: Path
) -> None:
    make(tmp_path, FOUR)
    assert names(surplus(tmp_path, Kept(last, best, ACCURACY))) == gone


def test_a_checkpoint_without_the_metric_is_not_among_the_best(tmp_path: Path) -> None:
    make(tmp_path, {"step_000001": 0.0, "step_000002": None, "step_000003": None})
    assert names(surplus(tmp_path, Kept(1, 1, ACCURACY))) == ["step_000002"]


def test_a_damaged_checkpoint_is_not_among_the_best(tmp_path: Path) -> None:
    make(tmp_path, FOUR)
    path = tmp_path / "step_000003" / MANIFEST_FILE
    path.write_text(path.read_text().replace("0.9", "0.99"))
    assert names(surplus(tmp_path, Kept(1, 1, ACCURACY))) == ["step_000003", "step_000002"]


def test_the_newest_whole_one_stays_whatever_is_named_newer(tmp_path: Path) -> None:
    make(tmp_path, FOUR)
    newest = tmp_path / "step_000003"
    assert names(prune(tmp_path, newest, Kept(1, 0, ACCURACY))) == ["step_000002", "step_000001"]
    assert names(checkpoint_folders(tmp_path)) == ["step_000004", "step_000003"]


def test_an_earlier_attempt_at_a_step_goes(tmp_path: Path) -> None:
    make(tmp_path, {"step_000001": 0.5, "step_000002": 0.9})
    again = free_name(tmp_path, 2)
    assert again.name == "step_000002.1"
    make(tmp_path, {again.name: 0.4})
    assert free_name(tmp_path, 2).name == "step_000002.2"
    assert names(prune(tmp_path, again, Kept(None, 0, ACCURACY))) == ["step_000002"]
    assert names(checkpoint_folders(tmp_path)) == ["step_000002.1", "step_000001"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, {"step_1000000": 0.0, "step_999999": 0.0, "step_000010": 0.0})
    for other in ("step_12", "damaged_step_000011", ".partial_step_000012.ab", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_000013").write_text("no folder")
    found = ["step_1000000", "step_999999", "step_000010"]
    assert names(checkpoint_folders(tmp_path)) == found
    assert json.loads((tmp_path / "step_000010" / MANIFEST_FILE).read_text())["format"] == 1
