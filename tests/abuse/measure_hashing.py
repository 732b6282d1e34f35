"""What the digests cost a save: ``python -m tests.abuse.measure_hashing [FOLDER]``.

Saves of the same state, in turns with and without the digests, on one rank; everything else, the
write-out to disk included, is the same. Prints the medians, and the fastest saves,
which other work on the machine disturbs least.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from nemo_apo.trainer import checkpoint_write, durable_files
from nemo_apo.trainer.durable_files import FileRecord
from tests.parallel.ranks import run_ranks
from tests.trainer.tiny_runs import TINY_MODEL, tiny_config

from .two_states import at, initialize, save_at

ROUNDS = 11


def without_digest(path: Path) -> FileRecord:
    """Write a file out to disk and read nothing back."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileRecord(path.stat().st_size, "0" * 64)


def measure(folder: Path) -> tuple[list[float], list[float], int]:
    """Seconds of each save with and without digests, and the bytes of one."""
    model = replace(
        TINY_MODEL,
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=1536,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
    )
    config = tiny_config(model=model)
    config = replace(config, run=replace(config.run, keep_last=1))
    training = at(1, config, initialize(config))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    settle = durable_files.settle_file
    step = 0
    for _ in range(ROUNDS):
        for digests in (True, False):
            step += 1
            checkpoint_write.settle_file = settle if digests else without_digest
            began = time.perf_counter()
            saved = save_at(folder, training, step)
            seconds[digests].append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in saved.iterdir())
    return seconds[True], seconds[False], size


def main(root: str | None) -> None:
    """Measure in a new folder below ``root`` (None: where temporary files go)."""
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        with_digests, without, size = run_ranks(1, measure, folder, timeout_s=600.0)[0]
    finally:
        shutil.rmtree(folder)
    first, second = statistics.median(with_digests), statistics.median(without)
    print(f"{size / 2**20:.0f} MiB, {ROUNDS} saves each")
    for label, values, median in (("with", with_digests, first), ("without", without, second)):
        print(f"{label:8} digests: {median:.3f} s ({min(values):.3f} to {max(values):.3f})")
    fastest = 1.0 - min(without) / min(with_digests)
    print(f"digests: {1.0 - second / first:.1%} of the median save, {fastest:.1%} of the fastest")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
