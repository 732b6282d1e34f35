"""The version guard names what is missing; checked on modules made for the test."""

import sys
import types
from collections.abc import Iterator

import pytest

from nemo_apo.aligner import interface_guard
from nemo_apo.aligner.interface_guard import check
from nemo_apo.plugin.interface_guard import InterfaceMismatch, Needed

HOST = "made_host_of_interface_guard"


class Actor:
    def get_loss(self, batch: object, forward_only: bool) -> None: ...


@pytest.fixture(autouse=True)
def made_host() -> Iterator[None]:
    module = types.ModuleType(HOST)
    module.Actor = Actor  # type: ignore[attr-defined]
    sys.modules[HOST] = module
    yield
    del sys.modules[HOST]


def test_what_fits_passes() -> None:
    check((Needed(HOST, "Actor.get_loss", ("batch", "forward_only")), Needed(HOST, "Actor")))


@pytest.mark.parametrize(
    ("needed", "problem"),
    [
        (Needed("no_such_host", "Actor"), r"no_such_host cannot be imported \(No module named"),
        (Needed(HOST, "Trainer"), rf"{HOST}\.Trainer does not exist"),
        (Needed(HOST, "Actor.get_metrics"), rf"{HOST}\.Actor\.get_metrics does not exist"),
        (
            Needed(HOST, "Actor.get_loss", ("batch", "is_training", "rank")),
            rf"{HOST}\.Actor\.get_loss has no parameter is_training, rank",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_tested_versions(needed: Needed, problem: str) -> None:
    with pytest.raises(InterfaceMismatch, match=problem) as caught:
        check((needed,))
    assert "8c31926" in str(caught.value)
    assert "megatron-core" in str(caught.value)


def test_the_mixin_is_guarded_for_both_hosts() -> None:
    paths = {need.path for need in interface_guard.GRPO + interface_guard.RELEASED}
    assert "MegatronGPTActorModel.get_loss_and_metrics" in paths
    assert "MegatronGPTReinforceActorModel.get_inference_log_probs" in paths


@pytest.mark.pinned
@pytest.mark.released
def test_the_release_fits() -> None:
    from tests.aligner import cpu_host

    cpu_host.before_import()
    check(interface_guard.RELEASED)


@pytest.mark.pinned
@pytest.mark.released
def test_the_release_is_not_the_branch() -> None:
    with pytest.raises(InterfaceMismatch, match=r"nemo_aligner\.experimental\.grpo"):
        check(interface_guard.GRPO)


@pytest.mark.pinned
@pytest.mark.branch
def test_the_branch_fits() -> None:
    from tests.aligner import cpu_host

    cpu_host.before_import()
    check(interface_guard.GRPO)
