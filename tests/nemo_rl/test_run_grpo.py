"""The command line up to where Ray would start, on a small stand-in of NeMo-RL."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

import nemo_apo
from nemo_apo.config import ConfigError
from nemo_apo.nemo_rl import host_rules, interface_guard, run_grpo
from nemo_apo.nemo_rl.settings import read_settings
from nemo_apo.plugin.bookkeeping import TrainingStopped
from nemo_apo.plugin.interface_guard import InterfaceMismatch, Needed
from nemo_apo.plugin.rollout import RolloutError
from tests.nemo_rl import example_host
from tests.nemo_rl.example_config import NEEDED, example

ROOT = Path(nemo_apo.__file__).parent.parent
EXAMPLE = "examples/configs/grpo_math_1B.yaml"
FITTING = [f"{key}={str(value).lower()}" for key, value in NEEDED.items()]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return example_host.install(tmp_path / "NeMo-RL", monkeypatch)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a run would have been started with."""
    calls: list[Any] = []
    monkeypatch.setattr(run_grpo, "run", lambda *arguments: calls.append(arguments))
    return calls


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake leaves on stderr."""
    with pytest.raises(SystemExit) as left:
        run_grpo.main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nemo-apo: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.usefixtures("started")
class TestMistakes:
    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            ([*FITTING, "+apo.schedule.alpha_mim=0.4"], "apo.schedule.alpha_mim=0.4: there is no"),
            ([*FITTING, "grpo.adv_estimator.name=gdpo"], "grpo.adv_estimator.name=gdpo: must be"),
            ([*FITTING, "grpo.max_num_step=3"], "did you mean grpo.max_num_steps"),
            ([], "grpo.use_leave_one_out_baseline=true: must be false"),
        ],
    )
    def test_one_sentence_and_status_2(
        self,
        overrides: list[str],
        said: str,
        host: Path,
        started: list[Any],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert said in refusal(capsys, "--config", str(host / EXAMPLE), *overrides)
        assert said in refusal(capsys, "--config", str(host / EXAMPLE), "--check", *overrides)
        assert started == []

    def test_a_host_that_is_not_known(
        self, host: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        # The small one has the functions that compose a configuration, and no more.
        said = refusal(capsys, "--config", str(host / EXAMPLE), *FITTING)
        assert "nemo_rl.algorithms.loss.interfaces cannot be imported" in said
        assert "tested with NeMo-RL 0.7.0 and its main branch at commit 7ea279ab" in said
        assert started == []

    def test_a_folder_without_examples(
        self, host: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe = ("--config", "qwen3_8b_math_dtensor", "--check", "--nemo-rl", str(tmp_path))
        said = refusal(capsys, *recipe)
        assert "grpo_math_8B.yaml is neither beside this file nor" in said
        assert str(tmp_path) in said

    def test_an_option_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            run_grpo.main(["--config", "x", "--chek"])
        assert left.value.code == 2
        assert "unrecognized arguments: --chek" in capsys.readouterr().err


def test_a_check_prints_the_settings_and_starts_nothing(
    host: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*FITTING, "apo.schedule.name=ess", "+apo.schedule.alpha_min=0.4"]
    overrides += ["policy.train_global_batch_size=128"]
    run_grpo.main([*overrides[:2], "--config", str(host / EXAMPLE), "--check", *overrides[2:]])
    out = capsys.readouterr().out
    block, _, shape = out.strip().rpartition("\n\n")
    wanted = {"schedule": {"name": "ess", "alpha_min": 0.4}}
    assert read_settings(OmegaConf.create(block).apo) == read_settings(wanted)
    assert shape == (
        "An RL step takes 32 groups of 16 answers, in 4 optimizer steps; every rule holds."
    )
    assert started == []


def test_what_is_checked_is_run(
    host: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded: list[Any] = []
    monkeypatch.setattr(interface_guard, "check", lambda *needed: guarded.append(needed))
    monkeypatch.setenv("PYTHONPATH", "")
    run_grpo.main(["--config", str(host / EXAMPLE), *FITTING, "apo.tau.base=0.5"])
    [(config, settings)] = started
    assert config["apo"]["tau"]["base"] == settings.tau.base == 0.5
    assert config["grpo"]["adv_estimator"]["normalize_rewards"] is False
    assert guarded == [(interface_guard.CONFIGURATION,), ()], "first its files, then the rest"
    assert os.environ["PYTHONPATH"] == str(ROOT.resolve())


@pytest.mark.parametrize("stopped", [RolloutError("no groups"), TrainingStopped("not finite")])
def test_a_run_that_cannot_go_on_ends_with_its_reason(
    stopped: Exception, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise stopped

    monkeypatch.setattr(run_grpo, "run", stop)
    monkeypatch.setattr(interface_guard, "check", lambda *needed: None)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit, match=str(stopped)) as error:
        run_grpo.main(["--config", str(host / EXAMPLE), *FITTING])
    assert error.value.code == f"nemo-apo: {stopped}", "text: said, and status 1"


class TestWorkers:
    """What workers get to import the package from."""

    def package_in(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nemo_apo, "__file__", str(folder / "nemo_apo" / "__init__.py"))

    @pytest.mark.parametrize("before", [[], ["/a"], ["/a", "/b"]])
    def test_its_folder_comes_last(
        self, before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.package_in(tmp_path, monkeypatch)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
        for _ in range(2):
            run_grpo.share_with_workers()
            assert os.environ["PYTHONPATH"].split(os.pathsep) == [*before, str(tmp_path)]

    def test_a_folder_of_many_packages_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.package_in(tmp_path / "site-packages", monkeypatch)
        monkeypatch.setenv("PYTHONPATH", "/a")
        monkeypatch.delenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", raising=False)
        with pytest.raises(ConfigError, match=r"PYTHONPATH=.*site-packages: would hide .*--target"):
            run_grpo.share_with_workers()
        monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")
        run_grpo.share_with_workers()
        assert os.environ["PYTHONPATH"] == "/a"


@pytest.mark.parametrize(
    ("changes", "prompts", "steps"),
    [
        ({}, 100, 3),
        ({"grpo.max_num_epochs": 4}, 100, 12),
        ({"grpo.max_num_epochs": 4, "grpo.max_num_steps": 5}, 100, 5),
        ({"grpo.use_dynamic_sampling": True, "grpo.batch_multiplier": 1.5}, 100, 2),
        ({"grpo.batch_multiplier": 3}, 100, 3),
        ({"data.use_multiple_dataloader": True, "grpo.max_num_steps": 5}, 1, 5),
    ],
)
def test_the_steps_of_a_run(changes: dict[str, Any], prompts: int, steps: int) -> None:
    config = OmegaConf.create(example())
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    assert run_grpo.total_steps(OmegaConf.to_container(config), range(prompts)) == steps


def test_data_for_no_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"{host_rules.PROMPTS}=32: leaves no RL step.* 31 prom"):
        run_grpo.total_steps(example(), range(31))


class Strict:
    """Stands for a class of the host that finds a mistake."""

    def __init__(self, **config: Any) -> None:
        import pydantic

        class Grpo(pydantic.BaseModel):
            seed: int

        if "grpo" not in config:
            raise ValueError("no grpo\nat all")
        pydantic.create_model("Master", grpo=(Grpo, ...))(**config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"grpo": {"seed": "x"}}, r"^grpo\.seed: Input should be a valid integer"),
        ({}, "^no grpo$"),
    ],
)
def test_a_mistake_that_the_host_finds(config: dict[str, Any], said: str) -> None:
    pytest.importorskip("pydantic")
    with pytest.raises(ConfigError, match=said):
        run_grpo._master_config(Strict, config)


def test_the_module_is_a_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nemo_apo.nemo_rl.run_grpo", "--config", "none"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("nemo-apo: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"


class TestGuard:
    def test_what_is_missing_is_named(self, host: Path) -> None:
        interface_guard.check(interface_guard.CONFIGURATION)
        needed = Needed("nemo_rl.utils.config", "merge_with_override", ("base", "override_config"))
        with pytest.raises(InterfaceMismatch, match="merge_with_override has no parameter base;"):
            interface_guard.check((needed,))
        with pytest.raises(InterfaceMismatch, match=r"utils\.config\.merge does not exist"):
            interface_guard.check((Needed("nemo_rl.utils.config", "merge"),))

    def test_a_name_that_is_no_callable_can_be_needed(self) -> None:
        interface_guard.check((Needed("nemo_apo.nemo_rl.interface_guard", "TESTED.versions"),))

    def test_what_takes_any_name_accepts_those_that_are_needed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = ModuleType("made_host")
        made.policy = lambda **anything: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_host", made)
        interface_guard.check((Needed("made_host", "policy", ("weights_path",)),))

    def test_all_that_is_passed_by_name_is_guarded(self) -> None:
        guarded = {need.path: set(need.parameters) for need in interface_guard.ALL}
        for path, names in _passed_by_name().items():
            assert names <= guarded[path], path


def _passed_by_name() -> dict[str, set[str]]:
    """Keyword arguments of the launcher's calls, read off its source."""
    tree = ast.parse(Path(run_grpo.__file__).read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    wanted = {"setup", "grpo_train", "configure_generation_config"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in wanted:
                found[name] = {keyword.arg for keyword in node.keywords if keyword.arg}
    assert found.keys() == wanted
    return found
