"""A save in a process of its own, run under strace from its first call on."""

import multiprocessing
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemo_apo.config import Config

from .two_states import STEP, at, initialize, save_at

_END_S = 60.0


def saved_under_strace(root: Path, config: Config, arguments: list[str]) -> int | None:
    """Save B in a process that strace has taken over; its exit code."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_save_when_told, args=(root, config, there))
    process.start()
    pid = here.recv()
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        if "attached" not in line:
            pytest.skip(f"NOT TESTED: strace may not trace another process here: {line.strip()}")
        here.send("go")
        process.join(_END_S)
    finally:
        process.kill()
        process.join()
        tracer.communicate(timeout=_END_S)
    return process.exitcode


def _save_when_told(root: Path, config: Config, channel: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    training = at(STEP["B"], config, initialize(config))
    channel.send(os.getpid())
    channel.recv()
    save_at(root, training, STEP["B"])
