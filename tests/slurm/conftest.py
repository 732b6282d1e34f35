import os
from collections.abc import Iterator

import pytest

from .cluster import LocalSlurm, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """A real Slurm of three nodes; required where CI=1, elsewhere skipped where it is missing."""
    reason = why_not()
    if reason is not None:
        assert os.environ.get("CI") != "1", reason
        pytest.skip(f"no Slurm: {reason}")
    with LocalSlurm(3) as running:
        yield running
