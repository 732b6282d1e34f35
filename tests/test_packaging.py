"""The wheel: built, installed and used from another folder."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import nemo_apo

REPOSITORY = Path(nemo_apo.__file__).parent.parent

pytestmark = pytest.mark.slow(reason="builds a wheel and makes a virtual environment")


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this repository, built without network by the backend that is installed."""
    pytest.importorskip("hatchling", reason="the build backend comes with requirements/test.txt")
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, REPOSITORY, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a new environment that holds the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    # torch is too large to be installed again: the new environment sees the packages of this one
    # through a .pth file. Its own site-packages comes first, so the wheel hides this repository.
    library = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    here = Path(pytest.__file__).parent.parent
    (library / "packages_of_the_tests.pth").write_text(f"{here}\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_conf_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nemo_apo"}
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert f"nemo_apo/conf/{path.relative_to(REPOSITORY / 'conf')}" in names
    for path in (REPOSITORY / "nemo_apo").rglob("*.py"):
        assert str(path.relative_to(REPOSITORY)) in names
    assert "nemo_apo/launch/job.sh" in names
    assert not [name for name in names if "test" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_command_finds_its_own_conf(installed: Path, tmp_path: Path) -> None:
    plan = run(installed / "nemo-apo", "train", "run.dry_run=true", cwd=tmp_path)
    assert "runs/quickstart" in plan
    code = "from nemo_apo.compose import conf_dir; print(conf_dir())"
    found = Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert found.is_relative_to(installed.parent.resolve())
    assert found.parts[-2:] == ("nemo_apo", "conf")
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_the_package(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "nemo-apo", "--version", cwd=tmp_path)
    assert shown == f"nemo-apo {nemo_apo.__version__}\n"
