"""From a YAML file and overrides to a whole NeMo-RL configuration.

Files are merged and overrides applied by NeMo-RL's own functions. This adds where ``defaults`` are
looked for, so that a recipe outside of NeMo-RL can start from one of its examples, and the block
``apo``: under a file that leaves it out, or some of its keys, lies the shipped one.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import first_line, suggestion
from nemo_apo.config import ConfigError, unread_sections
from nemo_apo.core.objectives import Objective
from nemo_apo.nemo_rl.settings import BLOCK, SHIPPED

_DEFAULTS = "defaults"
_OF_APO = re.compile(r"\+{0,2}(apo(\.[^=]*)?=)")
_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def compose(file: str, overrides: Sequence[str], host: Path) -> dict[str, Any]:
    """The configuration, resolved, as plain values.

    Args:
        file: path of a YAML file, or the name of a recipe in ``conf/nemo_rl``.
        overrides: Hydra's; keys of ``apo`` may be set with or without the plus signs by which Hydra
            tells new keys from present ones.
        host: NeMo-RL's folder, the one that holds ``examples``.

    Raises:
        ConfigError: naming the file, key or override that is wrong.
    """
    functions = importlib.import_module("nemo_rl.utils.config")
    functions.register_omegaconf_resolvers()
    config = _loaded(recipe_path(file), host)
    config = OmegaConf.merge({BLOCK.path: BLOCK.shipped()}, config)  # type: ignore
    written = [_OF_APO.sub(r"++\1", override, count=1) for override in overrides]
    try:
        config = functions.parse_hydra_overrides(config, written)
    except functions.OverridesError as error:
        raise ConfigError(_what_is_wrong(error.__cause__ or error, config)) from None
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or file
        raise ConfigError(f"{key}: {first_line(error)}") from None


def check_read(overrides: Sequence[str], objective: Objective) -> None:
    """Refuse an override of a section of ``apo`` that the objective never reads.

    Raises:
        ConfigError: naming the override.
    """
    unread = unread_sections(objective)
    for override in overrides:
        found = _OF_APO.match(override)
        section = (found[2] or "").split(".")[1:2] if found else []
        if unread.intersection(section):
            lacks = "alpha" if section == ["schedule"] else "anchor"
            raise ConfigError(
                f"{override}: {objective.name} has no {lacks}, so nothing would read it; leave it "
                "out or choose another apo.objective.name"
            )


def recipe_path(file: str) -> Path:
    """The file itself, or the shipped recipe of that name."""
    shipped = conf_dir() / "nemo_rl" / f"{file}.yaml"
    for path in (Path(file), shipped):
        if path.is_file():
            return path
    names = sorted(path.stem for path in shipped.parent.glob("*.yaml") if path.name != SHIPPED)
    raise ConfigError(f"--config {file}: no such file, nor a recipe; those are {', '.join(names)}")


def _loaded(path: Path, host: Path) -> DictConfig:
    """A file over its defaults, the last of which wins."""
    functions = importlib.import_module("nemo_rl.utils.config")
    try:
        config = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: must hold keys and values")
    names = config.pop(_DEFAULTS, [])
    base = OmegaConf.create({})
    for name in [names] if isinstance(names, str) else names:
        parent = _loaded(_default_path(str(name), path, host), host)
        base = functions.merge_with_override(base, parent)
    return functions.merge_with_override(base, config)


def _default_path(name: str, file: Path, host: Path) -> Path:
    """Beside the file, as NeMo-RL looks for it, else below NeMo-RL's folder."""
    for folder in (file.parent, host):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{file}: {_DEFAULTS}: {name} is neither beside this file nor in NeMo-RL's folder {host}; "
        "--nemo-rl DIR says where that is"
    )


def _what_is_wrong(error: BaseException, config: DictConfig) -> str:
    """A sentence about overrides that cannot be applied."""
    message = str(error).strip().splitlines()[0]
    found = _NO_SUCH_KEY.search(message)
    if found is None:
        return f"{getattr(error, 'override', None) or 'overrides'}: {message}"
    return f"{found[1]}: there is no such key{suggestion(found[1], _keys(config))}"


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted keys of all values, interpolations unresolved."""
    keys: list[str] = []
    for name in map(str, config):
        unread = OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name)
        section = None if unread else config[name]
        inner = _keys(section, f"{prefix}{name}.") if isinstance(section, DictConfig) else []
        keys += inner or [f"{prefix}{name}"]
    return keys
