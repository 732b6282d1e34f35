"""No code of the package runs what a file, a model or a shell says: a gate on its syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "nemo_apo").rglob("*.py"))
# What may never be called or subclassed, by dotted name, or by its last part after a dot.
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "tempfile.mktemp",
    ".extractall",
}
# (call, keyword, the only value allowed).
DEMANDED = [("torch.load", "weights_only", True)]
# (keyword, the value that no call may have).
REFUSED_KEYWORDS = [("shell", True), ("allow_pickle", True), ("weights_only", False)]
# Reviewed exceptions: file, what, why.
ALLOWED = {
    ("trainer/shard_files.py", "pickle.Unpickler"): "subclassed to refuse all but listed classes",
}


def dotted(node: ast.expr) -> str:
    """The name that an expression spells, "" if it spells none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def faults(source: str) -> Iterator[str]:
    """What the gate finds in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from (name for base in node.bases if (name := dotted(base)) in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in names if name in FORBIDDEN)
        elif isinstance(node, ast.Call):
            yield from _in_call(node)


def _in_call(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    keywords = {
        keyword.arg: keyword.value.value
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant)
    }
    if name in FORBIDDEN or (f".{name.rpartition('.')[2]}" in FORBIDDEN and "." in name):
        yield name
    for call, keyword, value in DEMANDED:
        if name == call and keywords.get(keyword) is not value:
            yield f"{call} without {keyword}={value}"
    for keyword, value in REFUSED_KEYWORDS:
        if keyword in keywords and keywords[keyword] is value:
            yield f"{keyword}={value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_foreign_is_run(path: Path) -> None:
    name = str(path.relative_to(ROOT / "nemo_apo"))
    found = [fault for fault in faults(path.read_text()) if (name, fault) not in ALLOWED]
    assert found == []


def test_every_exception_is_still_needed() -> None:
    for name, what in ALLOWED:
        assert what in set(faults((ROOT / "nemo_apo" / name).read_text())), name


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec('1')",
        "import pickle\npickle.loads(data)",
        "from pickle import loads\nloads(data)",
        "class Reader(pickle.Unpickler): pass",
        "yaml.load(file, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "tarfile.open(path).extractall(folder)",
        "archive.extractall()",
        "__import__(name)",
    ],
)
def test_the_gate_sees(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(text)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(file)",
        "subprocess.run(['ls'], shell=False)",
    ],
)
def test_the_gate_lets_pass(source: str) -> None:
    assert not list(faults(source))
