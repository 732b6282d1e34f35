"""A disk that fills up during a save: every rank says so, and earlier checkpoints stay whole."""

import ctypes
import itertools
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_apo.config import Config
from nemo_apo.parallel.gather import all_gather_objects
from nemo_apo.trainer.checkpoint_search import newest_verified
from nemo_apo.trainer.checkpoint_write import SaveFailed
from tests.parallel.ranks import run_ranks
from tests.trainer.tiny_runs import parallel

from .effort import report, tries
from .two_states import STEP, Training, abuse_config, at, initialize, save_a, save_at

TMPFS_BYTES = 2 * 2**20
_NEW_USER, _NEW_MOUNTS, _PRIVATE = 0x10000000, 0x00020000, 0x44000
# Largest file that may be written, bytes: from none at all to one short of the tensors.
SIZES = (0, 1_000, 5_000, 20_000, 41_000, 100_000, 300_000)


def message_of_failure(save: Callable[[], object]) -> str:
    try:
        save()
    except SaveFailed as error:
        return str(error)
    return ""


def newest_name(root: Path) -> str:
    found = newest_verified(root)
    assert found is not None
    assert found.damaged == ()
    return found.newest.folder.name


def limited_save(root: Path, config: Config, size: int, victim: int) -> tuple[list[str], str, str]:
    """Save B while the victim may write no larger file; messages, newest before and after more."""
    training = at(STEP["B"], config, initialize(config))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    message = message_of_failure(lambda: save_at(root, training, STEP["B"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    messages = all_gather_objects(message)
    then = newest_name(root)
    save_at(root, training, STEP["B"])
    return messages, then, newest_name(root)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_file_that_may_not_grow_fails_the_save_on_every_rank(victim: int, tmp_path: Path) -> None:
    config = replace(abuse_config(), parallel=parallel(2, 1))
    # Rank 1 writes no description of the checkpoint, so that small limits alone stop it.
    sizes = SIZES[1 :: 1 if victim == 0 else 2][: tries(3, 99)]
    for size in sizes:
        root = tmp_path / str(size)
        save_a(root, config, ranks=2)
        for messages, then, after in run_ranks(2, limited_save, root, config, size, victim):
            assert len(set(messages)) == 1
            assert f"rank {victim}: " in messages[0]
            assert "earlier ones are untouched" in messages[0]
            assert (then, after) == ("step_000001", "step_000002")
        assert [path.name for path in root.iterdir()] == ["step_000002"]
    report(f"RLIMIT_FSIZE on rank {victim} of two during a save", len(sizes))


def mounted_tmpfs(folder: Path) -> bool:
    """Mount a small file system that only this process sees; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS) != 0:
        if libc.unshare(_NEW_USER | _NEW_MOUNTS) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, _PRIVATE, None) != 0:
        return False
    options = f"size={TMPFS_BYTES}".encode()
    return bool(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options) == 0)


def fill_disk(root: Path, config: Config) -> tuple[str, int, list[str]] | None:
    """Save until the disk is full: message, saves before and names after; None if unmounted."""
    if not mounted_tmpfs(root):
        return None
    training = at(STEP["A"], config, initialize(config))
    for step in itertools.count(1):
        message = message_of_failure(partial(save_at, root, training, step))
        if message:
            break
    assert step > 1
    assert newest_name(root) == f"step_{step - 1:06d}"
    return message, step - 1, sorted(path.name for path in root.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="NOT TESTED: needs Linux name spaces")
def test_a_full_disk_leaves_earlier_checkpoints_whole(tmp_path: Path) -> None:
    config = abuse_config(keep_last=None)
    root = tmp_path / "disk"
    root.mkdir()
    outcome = run_ranks(1, fill_disk, root, config)[0]
    if outcome is None:
        pytest.skip("NOT TESTED: a tmpfs may not be mounted here")
    message, saved, names = outcome
    assert "rank 0: " in message
    assert names == [f"step_{step:06d}" for step in range(1, saved + 1)]
    report(f"a disk of {TMPFS_BYTES >> 20} MiB filled by saves", 1)


def test_the_training_is_at_hand(tmp_path: Path) -> None:
    """Without a limit the same save succeeds: the failures above are those of the limit."""

    def work() -> str:
        config = abuse_config()
        training: Training = at(STEP["B"], config, initialize(config))
        return message_of_failure(lambda: save_at(tmp_path / "a", training, STEP["B"]))

    assert run_ranks(1, work) == [""]
