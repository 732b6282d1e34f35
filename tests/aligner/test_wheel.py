"""This package's wheel, as ``scripts/test.sh`` installed it beside the pins with ``--no-deps``."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aligner.conftest import PINS

pytestmark = [pytest.mark.pinned, pytest.mark.released]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The environment's interpreter in a folder that is not the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment | {"NVIDIA_PYTORCH_VERSION": "none"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_pins_are_as_they_were() -> None:
    """``scripts/setup_venv.sh`` compares all other packages before and after the wheel."""
    for name, version in PINS.items():
        assert importlib.metadata.version(name) == version
    assert importlib.metadata.version("torch").split("+")[0] == "2.13.0"


def test_the_launch_entry_starts_from_the_wheel(tmp_path: Path) -> None:
    where = run("-c", "import nemo_apo; print(nemo_apo.__file__)", cwd=tmp_path)
    assert "site-packages" in where.stdout, where.stdout + where.stderr
    started = run(
        "-m",
        "nemo_apo.aligner.train_gpt_apo",
        "--cfg",
        "job",
        "+recipe=qwen2.5_7b",
        "++model.apo.schedule.alpha_min=0.4",
        cwd=tmp_path,
    )
    assert started.returncode == 0, started.stderr
    assert "alpha_min: 0.4" in started.stdout
    assert list(tmp_path.iterdir()) == []
