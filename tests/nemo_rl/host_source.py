"""Which NeMo-RL the tests run against: the checkout that ``NEMO_RL_SRC`` names, unmodified.

NeMo-RL is on no package index. What it imports is pinned in requirements/nemo_rl.txt.
"""

import functools
import importlib.metadata
import os
import sys
import typing
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
SOURCE_VARIABLE = "NEMO_RL_SRC"
# Set in the processes of the second kind of DTensor worker, see ``make_importable``.
AUTOMODEL_VARIABLE = "NEMO_APO_TESTS_AUTOMODEL"

# Distributions without which the host or its workers do not import.
NEEDED = ("datasets", "nemo_automodel", "ray", "torchao", "torchdata", "transformers")


def missing() -> list[str]:
    """What is not here of the host: distributions, the variable, or the checkout that it names."""
    absent = [name for name in NEEDED if not _is_installed(name)]
    if not os.environ.get(SOURCE_VARIABLE):
        absent.append(SOURCE_VARIABLE)
    elif not (checkout() / "nemo_rl" / "__init__.py").exists():
        absent.append(f"nemo_rl in {SOURCE_VARIABLE}={checkout()}")
    return absent


def checkout() -> Path:
    """The checkout's folder."""
    return Path(os.environ[SOURCE_VARIABLE]).resolve()


def python_path() -> list[str]:
    """What must be on the path of every process: this repository first, it has ``tests`` too."""
    return [str(REPOSITORY), str(checkout())]


@functools.cache
def make_importable() -> None:
    """Let this process import ``nemo_rl``. To be called before anything of it is imported."""
    if AUTOMODEL_VARIABLE not in os.environ:
        # The host gives it to one kind of worker; the others, if they find it, make other models.
        sys.modules["nemo_automodel"] = None  # type: ignore[assignment]
    sys.path.extend(path for path in python_path() if path not in sys.path)
    # Read when the table of the actors' environments is imported: all of them run in this one.
    os.environ["NEMO_RL_PY_EXECUTABLES_SYSTEM"] = "1"
    if sys.version_info < (3, 12):
        # pydantic refuses the plain one of older versions than the host is made for.
        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict


def show_automodel() -> None:
    """Let this process import Automodel."""
    if sys.modules.get("nemo_automodel", sys) is None:
        del sys.modules["nemo_automodel"]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
