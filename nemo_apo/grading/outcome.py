"""One grade: a finite number, or the reason why there is none."""

import math
import numbers
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Why a grade may be missing. A name is part of a metric's name (see ``nemo_apo.record``).
REASONS: dict[str, str] = {
    "raised": "the grader raised",
    "type": "the grader returned something that is no number",
    "not_finite": "the grader returned NaN or an infinity",
    "refused": "the answer was refused before it was evaluated",
    "memory": "the grader ran out of memory",
    "timeout": "the grader ran out of time",
    "cpu": "the grader used up its CPU time",
    "processes": "the grader started too many processes",
    "exited": "the grading process ended",
    "protocol": "the grading process sent something else than a grade",
}
_CODES = ("", *REASONS)
_HEAD = struct.Struct("<Bd")
_DETAIL_BYTES = 200


class Refused(BaseException):
    """An answer that must not be evaluated. No ``Exception``: libraries swallow those."""


@dataclass(frozen=True)
class Grade:
    """A grade.

    Attributes:
        value: the reward; NaN if it failed.
        reason: "" or a key of ``REASONS``.
        detail: where it failed, for a person; never the text of prompt or completion.
    """

    value: float
    reason: str = ""
    detail: str = ""

    @classmethod
    def failed(cls, reason: str, detail: str = "") -> "Grade":
        """A grade that failed for a key of ``REASONS``."""
        assert reason in REASONS
        return cls(math.nan, reason, detail)

    @property
    def code(self) -> int:
        """The reason as a small number: 0 for none, else 1 + its place in ``REASONS``."""
        return _CODES.index(self.reason)

    def to_bytes(self) -> bytes:
        """Code, value and a bounded detail."""
        detail = self.detail.encode(errors="replace")[:_DETAIL_BYTES]
        return _HEAD.pack(self.code, self.value) + detail

    @classmethod
    def from_bytes(cls, data: bytes) -> "Grade":
        """The grade of ``to_bytes``.

        Raises:
            ValueError: for anything else.
        """
        if not _HEAD.size <= len(data) <= _HEAD.size + _DETAIL_BYTES:
            raise ValueError("not the size of a grade")
        code, value = _HEAD.unpack_from(data)
        if code >= len(_CODES) or math.isfinite(value) != (code == 0):
            raise ValueError("neither a finite number nor a known reason")
        return cls(value, _CODES[code], data[_HEAD.size :].decode(errors="replace"))


def attempt(call: Callable[[], object]) -> Grade:
    """The grade that a call gives, whatever it does short of ending the process.

    A bool counts as 1 or 0. A ``KeyboardInterrupt`` is the user's and passes.
    """
    try:
        value = call()
        if not isinstance(value, numbers.Real):
            return Grade.failed("type", type(value).__name__)
        number = float(value)
    except KeyboardInterrupt:
        raise
    except MemoryError:
        return Grade.failed("memory")
    except Refused as refused:
        return Grade.failed("refused", str(refused))
    except BaseException as error:
        return Grade.failed("raised", where(error))
    return Grade(number) if math.isfinite(number) else Grade.failed("not_finite")


def where(error: BaseException) -> str:
    """Type and place of an exception; its message may hold what must not be shown."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}{place}"


def reason_of(code: int) -> str:
    """The reason of ``Grade.code``."""
    return _CODES[code]
