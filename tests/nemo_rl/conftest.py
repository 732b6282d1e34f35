"""Which tests need the real NeMo-RL, and the processes that they share.

One process has one NeMo-RL: the checkout that ``NEMO_RL_SRC`` names. With
``NEMO_APO_NEMO_RL_PINS=1`` a missing host is a failure, so that a run that is meant to have it
cannot pass by skipping.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nemo_rl import host_source
from tests.pinned_host import PinnedHost

HOST = PinnedHost(
    folder=Path(__file__).parent,
    promise="NEMO_APO_NEMO_RL_PINS",
    marks={
        "nemo_rl": "needs NeMo-RL in the checkout that "
        f"{host_source.SOURCE_VARIABLE} names, and requirements/nemo_rl.txt"
    },
    missing=host_source.missing,
)


def pytest_configure(config: pytest.Config) -> None:
    """Say which marks exist, and let this process import the host."""
    HOST.add_markers(config)
    if not host_source.missing():
        host_source.make_importable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, of this folder's tests, those that belong to another environment."""
    HOST.leave_out(config, items, HOST.belongs)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose host was promised and is not here."""
    HOST.fail_if_missing(item)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model and its tokenizer."""
    from tests.nemo_rl import tiny_model

    return tiny_model.make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def host_ray() -> Iterator[None]:
    """Ray on this machine."""
    from tests.nemo_rl import cluster

    with cluster.running_ray():
        yield


@pytest.fixture(scope="session", params=[1, 2], ids=["dtensor v1", "dtensor v2"])
def workers(request: pytest.FixtureRequest, host_ray: None, model: str) -> Iterator[Any]:
    """A policy under APO on two data-parallel workers; every test puts in weights first."""
    from nemo_rl.models.policy.lm_policy import Policy

    from tests.nemo_rl import cluster, host_config
    from tests.nemo_rl.host_session import apo_policy_class

    overrides = [*host_config.backend(request.param), *host_config.DYNAMIC_BATCHING]
    config = host_config.master_config(model, *overrides)
    with cluster.policy(config, apo_policy_class(Policy)) as policy:
        policy.first_weights = policy.weights()
        policy.use_dynamic_batching(False)
        yield policy


@pytest.fixture(scope="module")
def packing_workers(host_ray: None, model: str) -> Iterator[Any]:
    """The same, packing sequences; the second kind of worker packs with flash attention alone."""
    from nemo_rl.models.policy.lm_policy import Policy

    from tests.nemo_rl import cluster, host_config
    from tests.nemo_rl.host_session import apo_policy_class

    overrides = [*host_config.backend(1), *host_config.SEQUENCE_PACKING]
    config = host_config.master_config(model, *overrides)
    with cluster.policy(config, apo_policy_class(Policy)) as policy:
        policy.first_weights = policy.weights()
        yield policy
