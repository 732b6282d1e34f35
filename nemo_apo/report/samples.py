"""``samples.jsonl`` as the report shows it: what the first and the last kept step said."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_apo.record import KeptCompletion, KeptGroup
from nemo_apo.report.formats import number_text, visible


@dataclass(frozen=True)
class ShownCompletion:
    """A completion with a line that says what it is."""

    caption: str
    text: str


@dataclass(frozen=True)
class ShownGroup:
    """A prompt, and the best and the worst of what was said to it; one where all are worth equal.

    Every text can be shown: what has no glyph is written as an escape.
    """

    step: int
    prompt: str
    reference: str
    completions: tuple[ShownCompletion, ...]


def read_samples(path: Path) -> tuple[KeptGroup, ...]:
    """The groups of a file in its order; none if there is no file.

    A last line that a killed run left half-written is skipped.

    Raises:
        ValueError: naming file and line, for anything else that is malformed.
    """
    if not path.is_file():
        return ()
    *lines, unterminated = path.read_bytes().split(b"\n")
    groups = [_group(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if unterminated.strip():
        try:
            groups.append(_group(unterminated, f"{path}, line {len(lines) + 1}"))
        except ValueError:
            return tuple(groups)
    return tuple(groups)


def shown_groups(groups: Sequence[KeptGroup]) -> list[ShownGroup]:
    """The groups of the first and of the last kept step."""
    if not groups:
        return []
    ends = (min(group.step for group in groups), max(group.step for group in groups))
    return [_shown(group) for group in groups if group.step in ends]


def _shown(group: KeptGroup) -> ShownGroup:
    said, count = group.completions, len(group.completions)
    best, worst = max(said, key=_worth), min(said, key=_worth)
    chosen = [(f"best of {count}", best), (f"worst of {count}", worst)]
    if _worth(best) == _worth(worst):
        chosen = [(f"first of {count} that are worth the same", said[0])]
    return ShownGroup(
        step=group.step,
        prompt=visible(group.prompt),
        reference=visible(group.reference),
        completions=tuple(
            ShownCompletion(f"{name}: {_facts(one)}", visible(one.text)) for name, one in chosen
        ),
    )


def _worth(completion: KeptCompletion) -> float:
    """Its reward; without a grade it is the worst of all."""
    return -math.inf if completion.reward is None else completion.reward


def _facts(completion: KeptCompletion) -> str:
    reward = f"reward {number_text(completion.reward)}"
    if completion.failed:
        reward = f"no grade ({visible(completion.failed)})"
    cut = ", cut at the length limit" if completion.truncated else ""
    return f"{reward}, {completion.length} tokens{cut}"


def _group(line: bytes, where: str) -> KeptGroup:
    try:
        decoded = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    values = _fields(decoded, KeptGroup, where)
    completions = values["completions"]
    if not isinstance(completions, list) or not completions:
        raise ValueError(f"{where}: expected a list of completions, got {completions!r}")
    for completion in completions:
        _fields(completion, KeptCompletion, where)
    return KeptGroup.from_dict(values)


_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "prompt": (str,),
    "reference": (str,),
    "completions": (list,),
    "text": (str,),
    "reward": (int, float, type(None)),
    "length": (int,),
    "truncated": (bool,),
    "failed": (str,),
}


def _fields(decoded: Any, kind: type, where: str) -> dict[str, Any]:
    """The fields of one of the two dataclasses out of JSON."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(decoded, dict) or set(decoded) != set(names):
        raise ValueError(f"{where}: expected an object of {names}")
    for name, value in decoded.items():
        if type(value) not in _TYPES[name]:
            raise ValueError(f"{where}: {name!r} has the wrong type: {value!r}")
    return decoded
