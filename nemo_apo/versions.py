"""Versions of what figures depend on."""

import importlib.metadata
import platform
from collections.abc import Iterable

from nemo_apo import __version__


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of Python, and of those of the distributions that are installed."""
    found = {"nemo_apo": __version__, "python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
