import os
from collections.abc import Iterator

import pytest

from .cluster import INSTALLATION_FAILED, LocalSlurm, why_not
from .networks import Loopback, Namespaces, why_no_namespaces


def _require_slurm() -> None:
    """Required where CI=1 could install it, else skipped."""
    reason = why_not()
    if reason is not None:
        could_install = not reason.startswith(INSTALLATION_FAILED)
        assert os.environ.get("CI") != "1" or not could_install, reason
        pytest.skip(f"no Slurm: {reason}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A real Slurm of three nodes."""
    _require_slurm()
    with LocalSlurm(Loopback(3)) as running:
        yield running


@pytest.fixture(scope="module")
def network() -> Namespaces:
    """Three nodes in network namespaces of their own."""
    _require_slurm()
    reason = why_no_namespaces()
    if reason is not None:
        pytest.skip(f"no namespaces: {reason}")
    return Namespaces(3)


@pytest.fixture(scope="module")
def spread_slurm(network: Namespaces) -> Iterator[LocalSlurm]:
    """A real Slurm on them."""
    with LocalSlurm(network) as running:
        yield running
