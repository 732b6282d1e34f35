"""The settings of APO in a host's configuration as typed, checked values.

The shipped defaults stand, commented, in a file below ``conf`` (one per host). A section whose
class depends on its ``name`` (objective, schedule, tau) states the keys of all its classes there,
so that any of them can be overridden by its plain path. Hence two rules: null means the default of
the class that ``name`` chooses, and a key that this class does not have must stay as shipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import NAME, Schema, assigned, suggestion, typed_section
from nemo_apo.config import TAGGED_SECTIONS, ConfigError, require
from nemo_apo.core.alpha_schedule import GuardedSchedule, Schedule
from nemo_apo.core.diagnostics import Thresholds
from nemo_apo.core.filtering import GroupRules
from nemo_apo.core.objectives import Apo, Objective, Regularizers
from nemo_apo.core.temperature import FixedTemperature, Temperature

# The anchors whose log-probs the hosts have: they keep no further copies of the weights.
ANCHORS = ("old", "reference")
WITHOUT_STATE_RULES = ("error", "fresh")
VOCAB_SIZE = "vocab_size"


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
    """All of them.

    Attributes:
        vocab_size: rows of the output layer that are vocabulary; None is the tokenizer's size.
        prefix: what a person writes before a section in this host's configuration.
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
    prefix: str = field(default="", compare=False)


def _sections() -> dict[str, Mapping[str, Any]]:
    """The default of every section by its ``name``; "" where its class does not depend on one."""
    return {
        "objective": TAGGED_SECTIONS["objective"],
        "schedule": TAGGED_SECTIONS["schedule"],
        "tau": TAGGED_SECTIONS["tau"],
        "anchor": {"": AnchorChoice()},
        "regularizers": {"": Regularizers()},
        "groups": {"": GroupRules()},
        "diagnostics": {"": Thresholds()},
        "update": {"": UpdateRules()},
        "resume": {"": ResumeRules()},
    }


@dataclass(frozen=True)
class SettingsBlock:
    """The block of a host's configuration that holds the settings.

    Attributes:
        path: dotted keys from the configuration's root to the block.
        file: the shipped defaults, relative to ``conf``; they stand there under the same path.
        left_out: sections and keys that this host has no use for.
    """

    path: str
    file: str
    left_out: frozenset[str] = frozenset()

    @property
    def prefix(self) -> str:
        return f"{self.path}."

    @property
    def schema(self) -> Schema:
        sections = {key: value for key, value in _sections().items() if key not in self.left_out}
        return Schema(sections, prefix=self.prefix)

    def shipped(self) -> dict[str, Any]:
        """The block as shipped."""
        loaded = OmegaConf.load(conf_dir() / self.file)
        return OmegaConf.to_container(OmegaConf.select(loaded, self.path), resolve=True)  # type: ignore

    def read(self, block: DictConfig | Mapping[str, Any]) -> ApoSettings:
        """The settings of a block.

        Raises:
            ConfigError: for an unknown section or key (naming the nearest), a wrong type, a value
                out of range, or a key that the chosen objective, schedule or tau does not have.
        """
        plain = (
            OmegaConf.to_container(block, resolve=True) if isinstance(block, DictConfig) else block
        )
        if not isinstance(plain, Mapping):
            raise ConfigError(f"{assigned(self.path, plain)}: is a section, set one of its keys")
        values, schema, as_shipped = dict(plain), self.schema, self.shipped()
        vocab_size = None if VOCAB_SIZE in self.left_out else values.pop(VOCAB_SIZE, None)
        for section in values:
            if section not in schema.defaults:
                near = suggestion(f"{self.prefix}{section}", self._choices())
                raise ConfigError(f"{self.prefix}{section}: there is no such key{near}")
        _check_vocab_size(f"{self.prefix}{VOCAB_SIZE}", vocab_size)
        sections = {
            name: _section(name, values.get(name, {}), as_shipped[name], schema)
            for name in schema.defaults
        }
        return ApoSettings(**sections, vocab_size=vocab_size, prefix=self.prefix)

    def _choices(self) -> list[str]:
        """What a person may have meant by an unknown key."""
        schema = self.schema
        single = [] if VOCAB_SIZE in self.left_out else [f"{self.prefix}{VOCAB_SIZE}"]
        return [*(f"{self.prefix}{name}" for name in schema.defaults), *schema.all_keys(), *single]


def _section(section: str, values: object, as_shipped: Mapping[str, Any], schema: Schema) -> Any:
    if isinstance(values, Mapping) and "" not in schema.defaults[section]:
        values = _of_chosen_class(dict(values), as_shipped, schema.defaults[section])
    return typed_section(section, values, schema)


def _of_chosen_class(
    values: dict[str, Any], as_shipped: Mapping[str, Any], classes: Mapping[str, Any]
) -> dict[str, Any]:
    """A tagged section without its nulls, and without other classes' keys that are as shipped."""
    values.setdefault(NAME, as_shipped[NAME])
    default = classes.get(values[NAME])
    own = set(vars(default)) if default is not None else set()
    unset = object()
    return {
        key: value
        for key, value in values.items()
        if value is not None and (key in own or value != as_shipped.get(key, unset))
    }


def _check_vocab_size(key: str, value: object) -> None:
    if value is None:
        return
    fits = type(value) is int and value >= 2
    require(fits, key, value, "must be a whole number of at least 2, or null")
