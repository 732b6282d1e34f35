"""The core is plain torch: importing all of it loads no framework, and a breach would show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nemo_apo

FORBIDDEN = {
    "hydra",
    "matplotlib",
    "megatron",
    "nemo",
    "nemo_aligner",
    "nemo_rl",
    "omegaconf",
    "ray",
    "rich",
}
IMPORT_ALL = """
import importlib, json, pkgutil, sys

package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, sys.argv[1] + ".")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": names, "loaded": sorted({m.split(".")[0] for m in sys.modules})}))
"""


def import_all(package: str, *folders: Path) -> tuple[list[str], set[str]]:
    """Import a package and all its submodules in a fresh interpreter.

    Returns the submodules imported and the top-level modules that are loaded afterwards.
    """
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["imported"], set(answer["loaded"])


def test_the_core_loads_no_framework() -> None:
    root = Path(nemo_apo.__file__).parent
    imported, loaded = import_all("nemo_apo.core", root.parent)
    files = [path for path in (root / "core").rglob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} <= {name.rsplit(".", 1)[-1] for name in imported}
    assert "torch" in loaded
    assert loaded & FORBIDDEN == set()
    assert {name for name in loaded if name.startswith("nemo")} == {"nemo_apo"}


def test_a_framework_loaded_by_a_submodule_would_be_seen(tmp_path: Path) -> None:
    for stub in ("rich", "omegaconf"):
        (tmp_path / f"{stub}.py").touch()
    inner = tmp_path / "leaky" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "leaky" / "__init__.py").touch()
    (inner / "__init__.py").touch()
    (inner / "module.py").write_text("try:\n    import rich\nexcept ImportError:\n    pass\n")
    _, loaded = import_all("leaky", tmp_path)
    assert loaded & FORBIDDEN == {"rich"}
