"""The shipped YAML files: where they are and which options the groups have."""

from pathlib import Path

import nemo_apo
from nemo_apo.config import ConfigError

EXPERIMENT = "experiment"
GROUPS = ("objective", "schedule", "tau", "anchor", "task", "model", "parallel", EXPERIMENT)


def conf_dir() -> Path:
    """The folder of the shipped files: inside the installed package, else in the repository."""
    package = Path(nemo_apo.__file__).resolve().parent
    places = (package / "conf", package.parent / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise ConfigError(f"the folder conf is missing; looked for {places[0]} and {places[1]}")


def group_options(config_dir: Path | None = None) -> dict[str, dict[str, str]]:
    """Every option of every group with one line about it, the first comment of its file.

    Raises:
        ConfigError: if ``config_dir`` holds no option, or one that already exists.
    """
    options: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
    for root in filter(None, (conf_dir(), config_dir)):
        paths = [
            (group, path) for group in GROUPS for path in sorted((root / group).glob("*.yaml"))
        ]
        if not paths:
            raise ConfigError(
                f"--config-dir {root}: holds no option; expected files such as "
                f"{EXPERIMENT}/mine.yaml (groups: {', '.join(GROUPS)})"
            )
        for group, path in paths:
            if path.stem in options[group]:
                raise ConfigError(f"--config-dir {path}: {group}={path.stem} already exists")
            options[group][path.stem] = _first_comment(path)
    return options


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""
