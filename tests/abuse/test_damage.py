"""Damaged and hostile checkpoints: named, passed over, and never run."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch.distributed as dist

from nemo_apo.trainer import checkpoint, checkpoint_search
from nemo_apo.trainer.checkpoint_search import CheckpointError, newest_verified, set_aside
from nemo_apo.trainer.durable_files import read_record
from nemo_apo.trainer.sealed_folder import MANIFEST_FILE, seal
from nemo_apo.trainer.shard_files import DESCRIPTION_FILE
from tests.forked_ranks import RankFailure
from tests.parallel.ranks import run_ranks
from tests.trainer.tiny_runs import begin

from .effort import report, tries
from .two_states import STEP, abuse_config, at, copies, initialize, outcomes, save_at

CONFIG = abuse_config(keep_last=None)
KINDS = (
    ".metadata",
    "__0_0.distcp",
    "common.pt",
    "metadata.json",
    "random_00000.json",
    "trainer_state.json",
    MANIFEST_FILE,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of A and B."""
    root = tmp_path_factory.mktemp("checkpoints") / "a"

    def work() -> None:
        layout = initialize(CONFIG)
        for step in STEP.values():
            save_at(root, at(step, CONFIG, layout), step)

    run_ranks(1, work)
    assert {path.name for path in (root / "step_000002").iterdir()} == set(KINDS)
    return root


def flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, random: Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def delete(path: Path, random: Random) -> None:
    path.unlink()


def link(path: Path, random: Random) -> None:
    """The same content, behind a symbolic link."""
    aside = path.parent.parent / f"outside_{path.name}"
    shutil.copy(path, aside)
    path.unlink()
    path.symlink_to(aside)


def swap(path: Path, random: Random) -> None:
    """The same file of the other checkpoint: whole in itself, of another step."""
    other = path.parent.parent / "step_000001" / path.name
    content = path.read_bytes() + b" " if other.read_bytes() == path.read_bytes() else None
    path.write_bytes(content or other.read_bytes())


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": delete,
    "link": link,
    "swap": swap,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage: str, saved: Path, tmp_path: Path) -> None:
    random = Random(damage)
    kinds = list(KINDS) * (1 if damage in ("delete", "link", "swap") else tries(1, 40))
    original = tmp_path / "a"
    shutil.copytree(saved, original)
    roots = copies(original, len(kinds), damage)
    for root, kind in zip(roots, kinds, strict=True):
        DAMAGES[damage](root / "step_000002" / kind, random)
    for kind, outcome in zip(kinds, outcomes(roots, CONFIG), strict=True):
        assert outcome.loads == "A", kind
        assert outcome.damaged == ("step_000002",), kind
    report(f"damage by {damage} to a file of the newest checkpoint", len(kinds))


def find(root: Path) -> list[tuple[str, str]]:
    """Damaged checkpoints and why, in a process of its own."""

    def work() -> list[tuple[str, str]]:
        initialize(CONFIG)
        found = newest_verified(root)
        assert found is not None
        assert found.newest.folder.name == "step_000001"
        set_aside(found.damaged)
        return [(folder.name, reason) for folder, reason in found.damaged]

    return run_ranks(1, work)[0]


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


def test_an_added_file_is_named(root: Path) -> None:
    (root / "step_000002" / "more.pt").write_bytes(b"")
    assert find(root) == [("step_000002", "more.pt is not in the manifest")]


def test_a_manifest_with_one_changed_value_is_named(root: Path) -> None:
    """A value that no file contradicts: the step."""
    path = root / "step_000002" / MANIFEST_FILE
    text = path.read_text()
    assert text.count('"step": 2') == 1
    path.write_text(text.replace('"step": 2', '"step": 3'))
    assert find(root) == [("step_000002", "manifest.json does not match its own digest")]


def test_what_is_wrong_is_named_and_the_damaged_folder_set_aside(root: Path) -> None:
    os.truncate(root / "step_000002" / "common.pt", 10)
    ((name, reason),) = find(root)
    assert (name, reason[:26]) == ("step_000002", "common.pt has 10 bytes, no")
    assert {path.name for path in root.iterdir()} == {"step_000001", "damaged_step_000002"}


def test_all_damaged_is_refused(root: Path) -> None:
    for folder in root.iterdir():
        (folder / "common.pt").unlink()
    with pytest.raises(RankFailure, match=r"CheckpointError: no checkpoint in .* is whole") as info:
        find(root)
    assert "step_000002: common.pt is missing; step_000001: common.pt is missing" in str(info.value)


def reseal(folder: Path, files: dict[str, dict]) -> None:
    """Seal a folder as one who can write it would, with records of any names."""
    content = json.loads((folder / MANIFEST_FILE).read_text())
    content["files"].update(files)
    del content["sha256"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps({**content, "sha256": digest}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", "a\\b", ""])
def test_a_name_outside_the_folder_is_refused(name: str, root: Path) -> None:
    (root / "secret").write_text("x")
    reseal(root / "step_000002", {name: {"size": 1, "sha256": "0" * 64}})
    ((_, reason),) = find(root)
    assert f"names {name!r}, which is no file of the folder" in reason


def test_a_linked_folder_inside_is_refused(root: Path) -> None:
    folder = root / "step_000002"
    (folder / "sub").symlink_to(root / "step_000001")
    reseal(folder, {"sub": {"size": 1, "sha256": "0" * 64}})
    assert find(root) == [("step_000002", "sub is no regular file")]


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.mark),))


def plant(folder: Path, name: str, bomb: bytes) -> None:
    """Put a pickle into a checkpoint: in place of a file, or as an object in the shards."""
    if name != "__0_0.distcp":
        (folder / name).write_bytes(bomb)
        return
    description = pickle.loads((folder / DESCRIPTION_FILE).read_bytes())
    entries = description.storage_data
    index = next(index for index in entries if "_extra_state" in index.fqn)
    offset = (folder / name).stat().st_size
    entries[index] = replace(entries[index], offset=offset, length=len(bomb))
    with (folder / name).open("ab") as file:
        file.write(bomb)
    (folder / DESCRIPTION_FILE).write_bytes(pickle.dumps(description))


@pytest.mark.parametrize("name", [DESCRIPTION_FILE, "common.pt", "__0_0.distcp"])
def test_a_pickle_that_would_run_code_is_not_run_even_under_a_good_seal(
    name: str, root: Path, tmp_path: Path
) -> None:
    folder, mark = root / "step_000002", tmp_path / "it ran"
    bomb = pickle.dumps(_Bomb(mark))
    plant(folder, name, bomb)
    content = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).unlink()
    records = {path.name: read_record(path) for path in folder.iterdir()}
    seal(folder, records, content["about"])

    def load() -> str:
        training = begin(CONFIG)
        found = newest_verified(root)
        assert found is not None
        assert found.newest.folder == folder
        with pytest.raises(CheckpointError) as info:
            checkpoint.load(found.newest, training.policy, training.remembered, CONFIG)
        return str(info.value)

    assert f"cannot read {folder}: " in run_ranks(1, load)[0]
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb does work"


def test_ranks_that_see_different_folders_all_stop(root: Path, tmp_path: Path) -> None:
    """Rank 1 reads another disk."""
    other = Path(shutil.copytree(root, tmp_path / "disk of rank 1" / "a"))
    shutil.rmtree(other / "step_000002")

    def work() -> str:
        if dist.get_rank() == 1:
            look = checkpoint_search._look
            checkpoint_search._look = lambda folder: look(other / folder.name)
        with pytest.raises(CheckpointError) as info:
            newest_verified(root)
        return str(info.value)

    first, second = run_ranks(2, work)
    assert first == second
    assert "rank 1 sees another folder than rank 0 does (manifest.json is missing" in first
