"""The runs of one launch: a single one, or every combination of the values of a sweep."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_apo.config import ConfigError

# Slurm's own limit on the elements of an array is MaxArraySize, 1001 unless it was raised.
MOST_ELEMENTS = 1000


@dataclass(frozen=True)
class Element:
    """One combination: its overrides, and what tells its run folder from the others'."""

    name: str
    overrides: tuple[str, ...]


def read_sweep(overrides: Sequence[str]) -> tuple[list[str], list[Element]]:
    """Overrides with one value, and the combinations of those with several.

    Several values are written with commas (``objective=apo,gspo``) or as Hydra's ``range(0,3)``.
    The last axis varies fastest.

    Raises:
        ConfigError: if no override has several values, or there are too many combinations.
    """
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for text in overrides:
        key, values = _values(text)
        if values is None:
            fixed.append(text)
        elif key in axes:
            raise ConfigError(f"{text}: {key} is swept already")
        else:
            axes[key] = values
    if not axes:
        raise ConfigError("--sweep: needs an override with several values, such as run.seed=0,1,2")
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MOST_ELEMENTS:
        raise ConfigError(f"--sweep: {len(combinations)} runs, must be at most {MOST_ELEMENTS}")
    elements = [_element(list(axes), values) for values in combinations]
    names = {element.name for element in elements}
    if len(names) < len(elements):
        raise ConfigError("--sweep: two runs would have the same folder; a value stands twice")
    return fixed, elements


def _values(text: str) -> tuple[str, list[str] | None]:
    key = text.partition("=")[0]
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return key, None  # composing says what is wrong with it
    if not override.is_sweep_override():
        return key, None
    return key, [str(value) for value in override.sweep_string_iterator()]


def _element(keys: Sequence[str], values: Sequence[str]) -> Element:
    pairs = list(zip(keys, values, strict=True))
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in pairs]
    name = "_".join(re.sub(r"[^A-Za-z0-9_.+-]+", "-", part).strip("-") for part in parts)
    return Element(name, tuple(f"{key}={value}" for key, value in pairs))
