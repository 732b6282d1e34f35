"""The Triton kernels compile for the GPUs that they are meant for; no GPU is needed for that.

Their numbers are checked through Triton's interpreter in ``test_logprobs``.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_compile_for_gpus() -> None:
    """In a process of its own: here Triton interprets its kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.compile_kernels"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 kernels") == 4
