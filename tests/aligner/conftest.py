"""Which tests run with which NeMo-Aligner: the release, the branch, or none.

One process has one ``nemo_aligner``: the branch's if ``NEMO_ALIGNER_GRPO_PATH`` names a checkout of
it, else the installed one. With ``NEMO_APO_ALIGNER_PINS=1`` a missing host is a failure, so that a
run that is meant to have it cannot pass by skipping.
"""

import importlib.metadata
import os

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose host is not here, or fail it where the host was promised."""
    marks = {mark.name for mark in item.iter_markers()}
    if not marks & {"pinned", "released", "branch"}:
        return
    if missing := _missing_pins():
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get(PINS_VARIABLE) == "1":
            pytest.fail(f"{PINS_VARIABLE}=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    if "branch" in marks and not cpu_host.uses_branch():
        pytest.skip(f"{cpu_host.BRANCH_VARIABLE} names no checkout of the branch")
    if "released" in marks and cpu_host.uses_branch():
        pytest.skip(f"{cpu_host.BRANCH_VARIABLE} puts the branch in the release's place")


def _missing_pins() -> list[str]:
    """The distributions that are not installed at all; other versions are worth a try."""
    missing = []
    for name, version in PINS.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name} {version}")
    return missing
