"""What is relied on of a host, and a check that it is there.

The hosts have no plugin interface to rely on alone: their classes are subclassed and their
functions called. If one of them, or a parameter that is passed by name, is missing, the import
fails here with its name instead of somewhere in a run.
"""

import importlib
import inspect
from dataclasses import dataclass

from nemo_apo.versions import versions_of


class InterfaceMismatch(ImportError):
    """The host is not the one that this package was written for."""


@dataclass(frozen=True)
class Needed:
    """One name of the host: where it is, and parameters that it must accept by name.

    What takes any name, such as a class derived from the host's, accepts them.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tested:
    """What a plugin was run with.

    Attributes:
        plugin: the plugin's module.
        versions: for a person.
        packages: the distributions whose installed versions are told beside them.
    """

    plugin: str
    versions: str
    packages: tuple[str, ...]


def check(needed: tuple[Needed, ...], tested: Tested) -> None:
    """Import and inspect what is needed.

    Raises:
        InterfaceMismatch: naming what is missing, what is installed and what was tested.
    """
    for need in needed:
        problem = _problem(need)
        if problem:
            found = versions_of(tested.packages)
            installed = ", ".join(
                f"{name} {found.get(name, 'missing')}" for name in tested.packages
            )
            raise InterfaceMismatch(
                f"{problem}; {tested.plugin} was tested with {tested.versions}; "
                f"installed: {installed}"
            )


def _problem(need: Needed) -> str:
    """What is wrong with one of them; empty if nothing is."""
    try:
        found = importlib.import_module(need.module)
    except ImportError as error:
        return f"{need.module} cannot be imported ({error})"
    for part in need.path.split("."):
        if not hasattr(found, part):
            return f"{need.module}.{need.path} does not exist"
        found = getattr(found, part)
    if not need.parameters:
        return ""
    parameters = inspect.signature(found).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return ""
    lost = [name for name in need.parameters if name not in parameters]
    return f"{need.module}.{need.path} has no parameter {', '.join(lost)}" if lost else ""
