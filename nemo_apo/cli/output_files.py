"""Files that a command writes where it is told to."""

from pathlib import Path

from nemo_apo.config import ConfigError


def require_writable(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written once the work is done; None is no file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option} {path}: must be a file in a folder that exists")
