"""Which tests run with which NeMo-Aligner: the release, the branch, or none.

One process has one ``nemo_aligner``: the branch's if ``NEMO_ALIGNER_GRPO_PATH`` names a checkout of
it, else the installed one. With ``NEMO_APO_ALIGNER_PINS=1`` a missing host is a failure, so that a
run that is meant to have it cannot pass by skipping.
"""

import importlib.metadata
from pathlib import Path

import pytest

from tests.aligner import cpu_host
from tests.pinned_host import PinnedHost

# The versions that the tests were written against.
PINS = {"nemo_toolkit": "2.1.0", "megatron-core": "0.10.0", "nemo-aligner": "0.7.0"}


def _missing_pins() -> list[str]:
    """The distributions that are not installed at all; other versions are worth a try."""
    missing = []
    for name, version in PINS.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} {version}")
    return missing


HOST = PinnedHost(
    folder=Path(__file__).parent,
    promise="NEMO_APO_ALIGNER_PINS",
    marks={
        "pinned": "needs NeMo, megatron-core and NeMo-Aligner, the release or the branch",
        "released": "pinned, and needs the released NeMo-Aligner",
        "branch": "pinned, and needs the checkout of the branch that "
        f"{cpu_host.BRANCH_VARIABLE} names",
    },
    missing=_missing_pins,
)


def pytest_configure(config: pytest.Config) -> None:
    """Say which marks exist, and settle whose ``nemo_aligner`` this process has."""
    HOST.add_markers(config)
    if cpu_host.uses_branch() and not _missing_pins():
        cpu_host.choose_aligner()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, of this folder's tests, those that belong to another environment."""
    other = "released" if cpu_host.uses_branch() else "branch"

    def belongs(item: pytest.Item) -> bool:
        return HOST.belongs(item) and other not in HOST.marks_of(item)

    HOST.leave_out(config, items, belongs)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose host was promised and is not here."""
    HOST.fail_if_missing(item)
