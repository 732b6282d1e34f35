"""How numbers, durations and free text are written for a person."""

import math

MISSING = "-"


def number_text(value: float | None) -> str:
    """About three significant digits: 0.613, 12.4, 1,520, 4.1e-05; a dash for no number."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if value == 0:
        return "0"
    if size < 0.001 or size >= 1e7:
        return f"{value:.1e}"
    if size < 10:
        return f"{value:.3f}"
    if size < 100:
        return f"{value:.1f}"
    return f"{value:,.0f}"


def count_text(value: float | None) -> str:
    """A whole number with thousands separators, or a dash."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def duration_text(seconds: float | None) -> str:
    """A length of time: "45 s", "3 min 12 s", "2 h 05 min"; a dash for none."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clock_text(seconds: float | None) -> str:
    """A running clock of constant shape: "0:42", "3:12", "2:05:09"; "-:--" for unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def visible(text: str) -> str:
    """``text`` with line breaks and tabs, and anything else without a glyph as an escape.

    Control characters, marks that turn the direction of writing and halves of surrogate pairs are
    then read as what they are, and the text can be written in UTF-8.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def printable(text: str) -> str:
    """``text`` on one line without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
