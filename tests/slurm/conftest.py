import os
from collections.abc import Iterator

import pytest

from .cluster import INSTALLATION_FAILED, LocalSlurm, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A real Slurm of three nodes; required where CI=1 could install it, else skipped."""
    reason = why_not()
    if reason is not None:
        could_install = not reason.startswith(INSTALLATION_FAILED)
        assert os.environ.get("CI") != "1" or not could_install, reason
        pytest.skip(f"no Slurm: {reason}")
    with LocalSlurm(3) as running:
        yield running
