"""Which tests run with which NeMo-Aligner: the release, the branch, or none.

One process has one ``nemo_aligner``: the branch's if ``NEMO_ALIGNER_GRPO_PATH`` names a checkout of
it, else the installed one. With ``NEMO_APO_ALIGNER_PINS=1`` a missing host is a failure, so that a
run that is meant to have it cannot pass by skipping.
"""

import importlib.metadata
import os
from pathlib import Path

import pytest

from tests.aligner import cpu_host

PINS_VARIABLE = "NEMO_APO_ALIGNER_PINS"

# The versions that the tests were written against.
PINS = {"nemo_toolkit": "2.1.0", "megatron-core": "0.10.0", "nemo-aligner": "0.7.0"}

MARKERS = (
    "pinned: needs NeMo, megatron-core and NeMo-Aligner, the release or the branch",
    "released: pinned, and needs the released NeMo-Aligner",
    f"branch: pinned, and needs the checkout of the branch that {cpu_host.BRANCH_VARIABLE} names",
)


def pytest_configure(config: pytest.Config) -> None:
    """Say which marks exist, and settle whose ``nemo_aligner`` this process has."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if cpu_host.uses_branch() and not _missing_pins():
        cpu_host.choose_aligner()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, of this folder's tests, those that belong to another environment."""
    here = Path(__file__).parent
    apart = [item for item in items if here in item.path.parents and not _belongs(item)]
    if apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in apart]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose host was promised and is not here."""
    if _marks(item) and (missing := _missing_pins()):
        pytest.fail(f"{PINS_VARIABLE}=1, but not installed: {', '.join(missing)}", pytrace=False)


def _belongs(item: pytest.Item) -> bool:
    """Whether this environment is the one for the test."""
    marks = _marks(item)
    promised = os.environ.get(PINS_VARIABLE) == "1"
    if not marks:
        return not promised
    if not promised and _missing_pins():
        return False
    return ("released" if cpu_host.uses_branch() else "branch") not in marks


def _marks(item: pytest.Item) -> set[str]:
    """The marks of a test that say which host it needs."""
    return {mark.name for mark in item.iter_markers()} & {"pinned", "released", "branch"}


def _missing_pins() -> list[str]:
    """The distributions that are not installed at all; other versions are worth a try."""
    missing = []
    for name, version in PINS.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} {version}")
    return missing
