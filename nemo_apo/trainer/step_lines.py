"""Files of one JSON object per line and RL step, which a resumed run cuts back and goes on with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_apo import record
from nemo_apo.trainer.durable_files import replace_text, sync_folder


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines, which are on disk on return."""
    is_new = not path.exists()
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        # A checkpoint that survives a power cut must not outlive the lines before it.
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def cut_after(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line cut short by a killed run goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)[record.STEP] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    replace_text(path, "".join(kept))
