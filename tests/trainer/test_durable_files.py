import os
from pathlib import Path

import pytest

from nemo_apo.trainer import durable_files
from nemo_apo.trainer.durable_files import (
    FileRecord,
    make_partial,
    publish,
    read_record,
    remove_folder,
    remove_leftovers,
    replace_text,
    settle_file,
)

# SHA-256 of "abc", from FIPS 180-2.
ABC = FileRecord(3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_a_record_is_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert settle_file(tmp_path / "abc") == read_record(tmp_path / "abc") == ABC


def test_a_link_has_no_record(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "abc")
    with pytest.raises(OSError, match="symbolic link"):
        read_record(tmp_path / "link")


def test_a_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    replace_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(durable_files.os, "fsync", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_folders_come_and_go_by_one_rename(tmp_path: Path) -> None:
    partial, other = (make_partial(tmp_path, "step") for _ in range(2))
    assert partial != other
    (partial / "file").write_text("x")
    publish(partial, tmp_path / "step")
    assert (tmp_path / "step" / "file").read_text() == "x"
    remove_folder(tmp_path / "step")
    assert os.listdir(tmp_path) == [other.name]


def test_a_removal_that_was_interrupted_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "file").write_text("x")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(durable_files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "step")
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".removed_step.")
    make_partial(tmp_path, "step")
    (tmp_path / ".partial_file").write_text("x")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".partial_link").symlink_to(tmp_path / "kept")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]
