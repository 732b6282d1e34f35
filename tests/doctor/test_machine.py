import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_apo.doctor import machine
from nemo_apo.doctor.findings import FAILURE, OK, WARNING, Finding
from nemo_apo.doctor.machine import Wanted, check_machine

_GIB = 2**30


def level(finding: Finding) -> str:
    assert (finding.level == OK) == (finding.cure == "")
    return finding.level


def free(count: int) -> Callable[[object], SimpleNamespace]:
    return lambda _: SimpleNamespace(free=count)


def test_this_machine_is_fit(tmp_path: Path) -> None:
    findings = check_machine("n1", Wanted(shared=(tmp_path,), readable=(tmp_path,)), {})
    assert {finding.node for finding in findings} == {"n1"}
    assert [finding.check for finding in findings if finding.level == FAILURE] == []
    assert f"torch {torch.__version__}" in findings[0].told


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without GPUs")
def test_missing_gpus() -> None:
    assert level(machine.check_gpus("n1", 0)) == OK
    finding = machine.check_gpus("n1", 8)
    assert level(finding) == FAILURE
    assert finding.told.startswith("0 of 8")


@pytest.mark.parametrize(
    ("count", "expected"), [(60 * _GIB, OK), (10 * _GIB, WARNING), (_GIB // 2, FAILURE)]
)
def test_room_on_disk(
    count: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", free(count))
    finding = machine.check_disk("n1", tmp_path / "not" / "yet")
    assert level(finding) == expected
    assert str(tmp_path) in finding.told


@pytest.mark.parametrize(("count", "expected"), [(2 * _GIB, OK), (64 * 2**20, WARNING)])
def test_room_in_shared_memory(
    count: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", free(count))
    assert level(machine.check_shared_memory("n1", tmp_path)) == expected


def test_what_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert level(machine.check_readable("n1", tmp_path)) == OK
    assert level(machine.check_readable("n1", tmp_path / "file")) == OK
    finding = machine.check_readable("n1", tmp_path / "missing")
    assert level(finding) == FAILURE
    assert "missing" in finding.told


def test_a_mount_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_LOOK_S", 0.2)
    os.mkfifo(tmp_path / "hangs")
    finding = machine.check_readable("n1", tmp_path / "hangs")
    assert level(finding) == FAILURE
    assert "no answer" in finding.told
    with (tmp_path / "hangs").open("w"):
        pass  # lets the thread go


def test_tokens_are_named_and_never_shown() -> None:
    given = {"HF_TOKEN": "canary", "OTHER": ""}
    findings = list(machine.check_tokens("n1", ["WANDB_API_KEY", "OTHER"], given))
    assert {finding.told.split()[0]: finding.level for finding in findings} == {
        "WANDB_API_KEY": FAILURE,
        "OTHER": FAILURE,
        "HF_TOKEN": OK,
    }
    assert "canary" not in str(findings)
