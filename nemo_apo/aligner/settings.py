"""``model.apo`` of a NeMo-Aligner configuration as typed, checked values.

The shipped defaults stand, commented, in ``conf/aligner/gpt_apo.yaml``. A section whose class
depends on its ``name`` (objective, schedule, tau) states the keys of all its classes there, so that
any of them can be overridden by its plain path. Hence two rules: null means the default of the
class that ``name`` chooses, and a key that this class does not have must stay as shipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import NAME, Schema, suggestion, typed_section
from nemo_apo.config import TAGGED_SECTIONS, ConfigError, require
from nemo_apo.core.alpha_schedule import GuardedSchedule, Schedule
from nemo_apo.core.diagnostics import Thresholds
from nemo_apo.core.filtering import GroupRules
from nemo_apo.core.objectives import Apo, Objective, Regularizers
from nemo_apo.core.temperature import FixedTemperature, Temperature

# The anchors whose log-probs this host has: it keeps no further copies of the weights.
ANCHORS = ("old", "reference")
WITHOUT_STATE_RULES = ("error", "fresh")
PREFIX = "model.apo."
SHIPPED = "gpt_apo.yaml"


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class AnchorChoice:
    """The policy behind l_ref: "old" or "reference"."""

    name: str = "old"

    def __post_init__(self) -> None:
        _one_of("anchor.name", self.name, ANCHORS)


@dataclass(frozen=True)
class UpdateRules:
    """When to give up.

    Attributes:
        max_skipped_steps: optimizer steps skipped in a row (not finite) after which the run ends.
    """

    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        if self.max_skipped_steps < 1:
            raise ValueError(
                f"update.max_skipped_steps must be at least 1, got {self.max_skipped_steps}"
            )


@dataclass(frozen=True)
class ResumeRules:
    """What to do with a training checkpoint that holds no APO state: "error" or "fresh"."""

    without_state: str = "error"

    def __post_init__(self) -> None:
        _one_of("resume.without_state", self.without_state, WITHOUT_STATE_RULES)


@dataclass(frozen=True)
class ApoSettings:
    """All of ``model.apo``.

    Attributes:
        vocab_size: rows of the output layer that are vocabulary; None is the tokenizer's size.
        Others: the sections, see their classes.
    """

    objective: Objective = field(default_factory=Apo)
    schedule: Schedule = field(default_factory=GuardedSchedule)
    tau: Temperature = field(default_factory=FixedTemperature)
    anchor: AnchorChoice = field(default_factory=AnchorChoice)
    regularizers: Regularizers = field(default_factory=Regularizers)
    groups: GroupRules = field(default_factory=GroupRules)
    diagnostics: Thresholds = field(default_factory=Thresholds)
    update: UpdateRules = field(default_factory=UpdateRules)
    resume: ResumeRules = field(default_factory=ResumeRules)
    vocab_size: int | None = None


SCHEMA = Schema(
    {
        "objective": TAGGED_SECTIONS["objective"],
        "schedule": TAGGED_SECTIONS["schedule"],
        "tau": TAGGED_SECTIONS["tau"],
        "anchor": {"": AnchorChoice()},
        "regularizers": {"": Regularizers()},
        "groups": {"": GroupRules()},
        "diagnostics": {"": Thresholds()},
        "update": {"": UpdateRules()},
        "resume": {"": ResumeRules()},
    },
    prefix=PREFIX,
)
VOCAB_SIZE = "vocab_size"


def read_settings(apo: DictConfig | Mapping[str, Any] | None) -> ApoSettings:
    """The settings of a ``model.apo`` section.

    Raises:
        ConfigError: for an unknown section or key (naming the nearest), a wrong type, a value out
            of range, or a key that the chosen objective, schedule or tau does not have.
    """
    require(apo is not None, "model.apo", "null", f"is missing; start from {SHIPPED}")
    plain = OmegaConf.to_container(apo, resolve=True) if isinstance(apo, DictConfig) else apo
    assert isinstance(plain, Mapping)
    values = dict(plain)
    vocab_size = values.pop(VOCAB_SIZE, None)
    for section in values:
        if section not in SCHEMA.defaults:
            near = suggestion(f"{PREFIX}{section}", _choices())
            raise ConfigError(f"{PREFIX}{section}: there is no such key{near}")
    _check_vocab_size(vocab_size)
    as_shipped = shipped()
    sections = {
        name: _section(name, values.get(name, {}), as_shipped[name]) for name in SCHEMA.defaults
    }
    return ApoSettings(**sections, vocab_size=vocab_size)


def shipped() -> dict[str, Any]:
    """``model.apo`` as shipped."""
    path = conf_dir() / "aligner" / SHIPPED
    return OmegaConf.to_container(OmegaConf.load(path).model.apo, resolve=True)  # type: ignore


def _section(section: str, values: object, as_shipped: Mapping[str, Any]) -> Any:
    if not isinstance(values, Mapping):
        return typed_section(section, values, SCHEMA)
    values = dict(values)
    if "" not in SCHEMA.defaults[section]:
        values = _of_chosen_class(section, values, as_shipped)
    return typed_section(section, values, SCHEMA)


def _of_chosen_class(
    section: str, values: dict[str, Any], as_shipped: Mapping[str, Any]
) -> dict[str, Any]:
    """A tagged section without its nulls, and without other classes' keys that are as shipped."""
    values.setdefault(NAME, as_shipped[NAME])
    default = SCHEMA.defaults[section].get(values[NAME])
    own = set(vars(default)) if default is not None else set()
    unset = object()
    return {
        key: value
        for key, value in values.items()
        if value is not None and (key in own or value != as_shipped.get(key, unset))
    }


def _choices() -> list[str]:
    return [
        *(f"{PREFIX}{section}" for section in SCHEMA.defaults),
        *SCHEMA.all_keys(),
        f"{PREFIX}{VOCAB_SIZE}",
    ]


def _check_vocab_size(value: object) -> None:
    if value is None:
        return
    fits = type(value) is int and value >= 2
    require(fits, f"{PREFIX}{VOCAB_SIZE}", value, "must be a whole number of at least 2, or null")
