"""A grade as a record of numbers, and the rules for what a call returns."""

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_apo.grading import REASONS, Grade
from nemo_apo.grading.outcome import Refused, attempt
from nemo_apo.record import FAILED_GRADES_BY_REASON, METRICS


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


@pytest.mark.parametrize(
    ("value", "number"), [(1, 1.0), (0.5, 0.5), (True, 1.0), (Fraction(1, 4), 0.25), (-2.5, -2.5)]
)
def test_numbers_are_grades(value: object, number: float) -> None:
    assert attempt(lambda: value) == Grade(number)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: "1", "type"),
        (lambda: None, "type"),
        (lambda: [1.0], "type"),
        (lambda: torch.tensor(1.0), "type"),
        (lambda: 1j, "type"),
        (lambda: math.nan, "not_finite"),
        (lambda: -math.inf, "not_finite"),
        (lambda: 10**400, "raised"),
        (raising(ValueError()), "raised"),
        (raising(SystemExit(0)), "raised"),
        (raising(GeneratorExit()), "raised"),
        (raising(MemoryError()), "memory"),
        (raising(Refused()), "refused"),
    ],
)
def test_anything_else_is_a_failed_grade_with_its_reason(
    call: Callable[[], object], reason: str
) -> None:
    grade = attempt(call)
    assert grade.reason == reason
    assert math.isnan(grade.value)


def test_an_interrupt_is_the_users() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(raising(KeyboardInterrupt()))


@pytest.mark.parametrize("grade", [Grade(0.5), Grade(-1e300), *map(Grade.failed, REASONS)])
def test_a_grade_survives_the_pipe(grade: Grade) -> None:
    read = Grade.from_bytes(grade.to_bytes())
    assert (read.reason, read.detail) == (grade.reason, grade.detail)
    assert read.value == grade.value or (math.isnan(read.value) and grade.reason)


def test_a_detail_is_bounded() -> None:
    assert len(Grade.failed("raised", "x" * 10**6).to_bytes()) == 209


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\x00" * 210,
        struct.pack("<Bd", 0, math.nan),
        struct.pack("<Bd", 0, math.inf),
        struct.pack("<Bd", 1, 0.5),
        struct.pack("<Bd", len(REASONS) + 1, math.nan),
    ],
)
def test_what_is_no_grade_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not the size|neither"):
        Grade.from_bytes(data)


@given(st.binary(max_size=220))
def test_any_bytes_are_a_grade_or_refused(data: bytes) -> None:
    try:
        grade = Grade.from_bytes(data)
    except ValueError:
        return
    assert math.isfinite(grade.value) == (grade.reason == "")


def test_every_reason_has_its_metric() -> None:
    assert list(FAILED_GRADES_BY_REASON) == list(REASONS)
    assert set(FAILED_GRADES_BY_REASON.values()) <= set(METRICS)
