"""What every test relies on: no ranks from the environment, and the same examples at every run."""

import os
import signal

import hypothesis
import pytest
import torch

# A shell inside a cluster job has these; a test that wants ranks sets them itself.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")

for name in RANK_VARIABLES:
    os.environ.pop(name, None)

# A shell starts what it leaves in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports Triton: where there is no GPU, its kernels run as Python.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Deadlines would measure how busy the machine is.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A ``slow`` or ``gpu`` mark without a reason is refused."""
    for item in items:
        for mark in (*item.iter_markers("slow"), *item.iter_markers("gpu")):
            if not (mark.args or mark.kwargs.get("reason")):
                raise pytest.UsageError(f"{item.nodeid}: mark {mark.name} needs a reason")
