"""The CPU patches: refused where untested, applied once, each with a reason."""

import importlib.metadata

import pytest
import torch

from nemo_apo.parallel import cpu_runtime

from .ranks import run_ranks

without_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU patches are for machines without CUDA"
)


@pytest.mark.parametrize("version", ["0.15.0", "0.16.0", "0.17.0", "1.0.0"])
def test_an_untested_version_is_refused_by_name(version: str) -> None:
    with pytest.raises(cpu_runtime.UntestedMegatronError) as refusal:
        cpu_runtime.check_version(version)
    assert f"megatron-core {version}" in str(refusal.value)
    assert cpu_runtime.TESTED_MEGATRON_VERSIONS[-1] in str(refusal.value)


def test_the_installed_version_is_a_tested_one() -> None:
    cpu_runtime.check_version(importlib.metadata.version("megatron-core"))


@without_cuda
def test_a_refused_install_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_runtime, "_installed", False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    applied: list[str] = []
    monkeypatch.setattr(cpu_runtime, "PATCHES", ((lambda: applied.append("a patch"), "a reason"),))
    with pytest.raises(cpu_runtime.UntestedMegatronError, match=r"9\.9\.9"):
        cpu_runtime.install()
    assert applied == []


@without_cuda
def test_a_second_install_changes_nothing() -> None:
    def work() -> None:
        cpu_runtime.install()
        once = (torch.Tensor.type, torch.Tensor.cuda, torch.cuda.synchronize, torch.cuda.Stream)
        cpu_runtime.install()
        twice = (torch.Tensor.type, torch.Tensor.cuda, torch.cuda.synchronize, torch.cuda.Stream)
        assert once == twice
        # A patch applied twice would say torch.cuda.cuda.
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64

    run_ranks(1, work)


def test_every_patch_has_a_reason() -> None:
    assert cpu_runtime.PATCHES
    for apply, reason in cpu_runtime.PATCHES:
        assert reason.strip(), apply.__name__
    names = [apply.__name__ for apply, _ in cpu_runtime.PATCHES]
    assert len(set(names)) == len(names)
