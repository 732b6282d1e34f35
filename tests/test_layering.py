"""Which room of the package may import which: read from the sources, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_apo

ROOT = Path(nemo_apo.__file__).parent
# A room is a folder of the package or a module beside them; each may import itself. The typed
# configuration, its rules and what composes it count as one.
CONFIG = {"config", "config_rules", "compose"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "record": set(),
    "versions": set(),
    "core": set(),
    "hf_checkpoint": set(),
    "tasks": {"core"},
    "grading": {"tasks"},
    "config": {"core", "tasks", "grading"} | CONFIG,
    "config_rules": {"core", "tasks", "grading"} | CONFIG,
    "compose": {"core", "tasks", "hf_checkpoint"} | CONFIG,
    "step_metrics": {"core", "record"},
    "parallel": {"core"} | CONFIG,
    "planning": {"core"} | CONFIG,
    "report": {"record"} | CONFIG,
    "trainer": {
        "core",
        "tasks",
        "grading",
        "hf_checkpoint",
        "record",
        "step_metrics",
        "parallel",
        "report",
        "versions",
    }
    | CONFIG,
    "bench": {"core", "record", "step_metrics", "parallel", "trainer", "tasks", "versions"}
    | CONFIG,
    "launch": {"planning"} | CONFIG,
    "doctor": {"versions"} | CONFIG,
    "plugin": {"core", "record", "step_metrics", "versions"} | CONFIG,
    "aligner": {"core", "record", "step_metrics", "parallel", "plugin"} | CONFIG,
    "nemo_rl": {"core", "record", "step_metrics", "plugin"} | CONFIG,
}
# The way in from outside may use anything.
UNRESTRICTED = {"cli", "__main__"}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room_of(file: Path) -> str:
    """The room of a file, given relative to the package."""
    return file.with_suffix("").parts[0]


def imported_modules(source: str, file: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; relative ones made absolute."""
    package = ("nemo_apo", *file.parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = [*base, *(node.module or "").split(".")]
            yield from (".".join([*filter(None, stem), alias.name]) for alias in node.names)


def imported_rooms(source: str, file: Path) -> set[str]:
    """Rooms that a file imports; a name taken from the package itself counts as its root."""
    rooms = set()
    for module in imported_modules(source, file):
        top, *rest = module.split(".")
        if top == "nemo_apo":
            named = rest[0] if rest else "__init__"
            exists = (ROOT / named).is_dir() or (ROOT / f"{named}.py").is_file()
            rooms.add(named if exists else "__init__")
    return rooms


def breaches(source: str, file: Path) -> set[str]:
    """Rooms that a file imports although its own room may not. The root holds only the version."""
    room = room_of(file)
    if room in UNRESTRICTED:
        return set()
    return imported_rooms(source, file) - ALLOWED[room] - {room, "__init__"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_room_imports_only_the_rooms_below_it(file: Path) -> None:
    assert room_of(file) in ALLOWED.keys() | UNRESTRICTED, "a new room needs a row in the table"
    assert breaches((ROOT / file).read_text(encoding="utf-8"), file) == set()


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("core/target.py", "from nemo_apo.config import RunConfig", {"config"}),
        ("core/target.py", "import nemo_apo.trainer.model as model", {"trainer"}),
        ("core/target.py", "from nemo_apo import record", {"record"}),
        ("core/target.py", "def f():\n    from nemo_apo.parallel import gather", {"parallel"}),
        ("core/objectives/apo.py", "from ...config import RunConfig", {"config"}),
        ("core/objectives/apo.py", "from ... import record, tasks", {"record", "tasks"}),
        ("core/objectives/apo.py", "from ..groups import Groups", set()),
        ("core/target.py", "from nemo_apo import __version__", set()),
        ("core/target.py", "import torch\nfrom megatron.core import parallel_state", set()),
        ("record.py", "from nemo_apo.core.groups import Groups", {"core"}),
        ("config.py", "from nemo_apo.parallel.layout import Layout", {"parallel"}),
        ("parallel/step.py", "from nemo_apo.trainer import rollouts", {"trainer"}),
        ("report/html.py", "from nemo_apo.core import groups", {"core"}),
        ("trainer/model.py", "from nemo_apo.cli import main", {"cli"}),
        ("cli/__init__.py", "from nemo_apo.trainer import model", set()),
    ],
)
def test_the_check_sees_a_breach(file: str, source: str, expected: set[str]) -> None:
    assert breaches(source, Path(file)) == expected
