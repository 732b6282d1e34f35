"""Linters on what only a cluster or a container runtime would run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
SCRIPTS = sorted((REPOSITORY / "scripts").rglob("*.s*"))


def linter(name: str) -> str:
    """The path of a linter; requirements/test.txt has both."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def findings(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile(path: Path) -> None:
    assert findings(linter("hadolint"), path) == ""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script(path: Path) -> None:
    assert findings(linter("shellcheck"), "--external-sources", path) == ""


def test_there_is_something_to_lint() -> None:
    assert len(DOCKERFILES) == 2
    named = {"trainer.sbatch", "nemo_aligner.sbatch", "nemo_rl.sbatch"}
    assert named <= {path.name for path in SCRIPTS}
