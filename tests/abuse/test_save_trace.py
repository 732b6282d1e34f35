"""The order of system calls that makes a save durable, seen by strace."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_apo.trainer.sealed_folder import MANIFEST_FILE

from .effort import report
from .traced import saved_under_strace
from .two_states import abuse_config, save_a

_FSYNC = re.compile(r"fsync\(\d+<(?P<path>[^>]+)>\)\s+= 0")
_RENAME = re.compile(r'rename\("(?P<old>[^"]+)", "(?P<new>[^"]+)"\)\s+= 0')


@pytest.mark.skipif(shutil.which("strace") is None, reason="NOT TESTED: no strace here")
def test_everything_is_on_disk_before_the_rename_and_the_name_after_it(tmp_path: Path) -> None:
    config = abuse_config()
    config = replace(config, run=replace(config.run, keep_last=None))
    root, trace = tmp_path / "a", tmp_path / "trace"
    save_a(root, config)
    # -z leaves out calls that failed; -y names the file behind a descriptor.
    arguments = ["-y", "-z", "-e", "trace=fsync,rename", "-o", str(trace)]
    assert saved_under_strace(root, config, arguments) == 0
    synced: list[str] = []
    after: list[str] = []
    renames = []
    for line in trace.read_text().splitlines():
        if sync := _FSYNC.search(line):
            (after if renames else synced).append(sync["path"])
        elif (rename := _RENAME.search(line)) and Path(rename["old"]).parent == root:
            renames.append((rename["old"], rename["new"]))
    (old, new), *more = renames
    assert not more
    assert new == str(root / "step_000002")
    files = {path.name for path in Path(new).iterdir()}
    assert MANIFEST_FILE in files
    names = [Path(path).name for path in synced if Path(path).parent == Path(old)]
    assert set(names) >= files
    # The manifest after all that it speaks of, the folder after the manifest, then the rename.
    last = {name: len(names) - 1 - names[::-1].index(name) for name in files}
    assert max(last, key=lambda name: last[name]) == MANIFEST_FILE
    assert synced[-1] == old
    assert after[0] == str(root)
    report("order of fsync and rename in a save", 1)
