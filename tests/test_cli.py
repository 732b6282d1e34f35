"""The ``nemo-apo`` command: what it prints, how it ends, and what a mistake leaves: nothing."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import nemo_apo
from nemo_apo import cli
from nemo_apo.cli import dry_run, report, train
from nemo_apo.compose import compose, group_options
from nemo_apo.config import Config, ConfigError
from nemo_apo.record import METRICS_FILE

REPOSITORY = Path(nemo_apo.__file__).parent.parent
# Megatron is absent, as beside the base dependencies alone.
WITHOUT_MEGATRON = (
    "import sys; sys.modules['megatron'] = None; "
    "from nemo_apo.cli import main; sys.exit(main(sys.argv[1:]))"
)


def python(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a folder, with the package importable."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Outcome(NamedTuple):
    """Exit status and output of the command run inside this process."""

    status: int
    out: str
    err: str


@pytest.fixture
def nemo_apo_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            status = cli.main(arguments)
        except SystemExit as left:
            status = left.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


class TestAsAProcess:
    def test_a_mistake_is_one_message_with_status_2_and_no_file(self, tmp_path: Path) -> None:
        done = python(["-m", "nemo_apo", "train", "schedul.alpha_min=0.4"], tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr == (
            "nemo-apo: schedul.alpha_min=0.4: there is no such key; "
            "did you mean schedule.alpha_min?\n"
        )
        assert list(tmp_path.iterdir()) == []

    def test_a_dry_run_needs_no_megatron_and_leaves_no_file(self, tmp_path: Path) -> None:
        done = python(["-c", WITHOUT_MEGATRON, "train", "run.dry_run=true"], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "91,520 parameters" in done.stdout
        assert list(tmp_path.iterdir()) == []

    def test_config_needs_no_megatron_and_names_every_section(self, tmp_path: Path) -> None:
        done = python(["-c", WITHOUT_MEGATRON, "config", "objective=gspo"], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert yaml.safe_load(done.stdout)["objective"]["name"] == "gspo"

    def test_a_reader_that_leaves_early_is_no_error(self, tmp_path: Path) -> None:
        command = f"{sys.executable} -m nemo_apo config | head -n 1"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("run:\n", "")


class TestHelp:
    def test_without_arguments_the_help_is_shown(self, nemo_apo_command) -> None:
        done = nemo_apo_command()
        assert done.status == 0
        assert "examples:" in done.out

    @pytest.mark.parametrize("command", cli.COMMANDS)
    def test_every_command_has_help_with_an_example(self, command: str, nemo_apo_command) -> None:
        done = nemo_apo_command(command, "--help")
        assert done.status == 0
        assert f"nemo-apo {command}" in done.out.split("examples:")[1]
        assert command in nemo_apo_command("--help").out

    @pytest.mark.parametrize("command", ["train", "config"])
    def test_the_examples_compose(self, command: str) -> None:
        for example in cli.COMMANDS[command].examples:
            words = example.split("  ")[0].split()
            overrides = [w for w in words if re.fullmatch(r"[a-z_.]+=[a-z0-9_]+", w)]
            compose(overrides)

    def test_version(self, nemo_apo_command) -> None:
        done = nemo_apo_command("--version")
        assert (done.status, done.out) == (0, f"nemo-apo {nemo_apo.__version__}\n")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["trian"], "did you mean train?"),
            (["train", "--foo"], "unrecognized argument --foo"),
            (["train", "run.steps=0"], "run.steps=0: must be at least 1"),
            (["train", "parallel=tp2"], "must divide the number of ranks, which is 1"),
            (["train", "schedule.alpha_min=7"], "schedule.alpha_min must lie in [0, 1], got 7"),
            (["train", "--config"], "expected one argument"),
            (["train", "--config", "none.yaml"], "no such file"),
            (["train", "--config-dir", "none"], "holds no option"),
            (
                ["train", "grading.workers=1", "grading.grader='no.such:grade'"],
                "grading.grader=no.such:grade: ModuleNotFoundError: No module named 'no'",
            ),
            (
                ["train", "grading.workers=1", "grading.grader='os.path:sep'"],
                "grading.grader=os.path:sep: TypeError: is a str, which cannot be called",
            ),
            (
                [
                    "train",
                    "model.transformer_impl=transformer_engine",
                    "model.params_dtype=bfloat16",
                    "parallel.backend=gloo",
                ],
                "model.transformer_impl=transformer_engine: needs a CUDA device",
            ),
            (["config", "run.name=a/b"], "run.name=a/b"),
            (["config", "parallel.tensor_model_parallel_size=0"], "must be at least 1"),
            (["report"], "required: RUN"),
            (["report", "none"], "none: there is no such run folder"),
            (["report", "."], "is not a run folder"),
        ],
    )
    def test_one_line_on_stderr_and_status_2(
        self, arguments: list[str], part: str, nemo_apo_command, tmp_path: Path
    ) -> None:
        done = nemo_apo_command(*arguments)
        assert done.status == 2
        assert done.out == ""
        assert done.err.startswith("nemo-apo: ")
        assert done.err.count("\n") == 1
        assert part in done.err
        assert list(tmp_path.iterdir()) == []

    def test_only_the_first_rank_speaks_but_every_rank_leaves(
        self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank, spoken in (("0", 1), ("1", 0)):
            monkeypatch.setenv("RANK", rank)
            done = nemo_apo_command("train", "run.stepps=3")
            assert (done.status, done.err.count("\n")) == (2, spoken)

    def test_a_missing_package_is_named_with_what_installs_it(
        self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        done = nemo_apo_command("train")
        assert done.status == 2
        assert "needs megatron" in done.err
        assert "pip install 'nemo_apo[trainer]'" in done.err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("value", ["two", "0", "-1"])
    def test_a_world_size_that_is_no_number(
        self, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(ConfigError, match=f"WORLD_SIZE={value}"):
            train.world_size()


class TestDryRun:
    def test_the_plan(self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "8")
        done = nemo_apo_command(
            "train",
            "run.dry_run=true",
            "run.name=mine",
            "parallel=tp2_pp2",
            "run.steps=10",
            "rollout.prompts=12",
            "rollout.group_size=5",
            "update.mini_batches=3",
            "update.epochs=2",
        )
        plan = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
        assert plan["run folder"] == "runs/mine"
        assert plan["task"] == "sort, reward exact"
        assert (plan["objective"], plan["schedule"]) == ("apo", "guarded")
        assert plan["layout"] == "8 ranks = TP 2 x PP 2 x CP 1 x DP 2"
        assert plan["memory"].endswith("on the fullest rank, computed; fits on h100, h200")
        assert plan["samples"] == "60 per RL step (12 prompts x 5 completions), 600 in all"
        assert plan["optimizer steps"] == "6 per RL step (3 mini-batches x 2 epochs), 60 in all"

    def test_context_parallel_ranks_are_no_data_parallel_ones(self) -> None:
        assert "8 ranks = TP 1 x PP 1 x CP 2 x DP 4" in dry_run.plan(compose(["parallel=cp2"]), 8)

    def test_an_objective_without_alpha_has_no_schedule(self) -> None:
        assert "none (gspo has no alpha)" in dry_run.plan(compose(["objective=gspo"]), 1)

    def test_a_folder_that_holds_a_run_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        folder = Path("runs/quickstart")
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        assert "holds a run already; run.if_exists=error" in dry_run.plan(Config(), 1)

    def test_only_the_first_rank_prints(
        self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        done = nemo_apo_command("train", "run.dry_run=true")
        assert (done.status, done.out) == (0, "")

    @pytest.mark.parametrize(
        ("overrides", "parameters"),
        [
            # Vocabulary 12 padded to 16: 2 x 16 x 64 outside the layers, 64 of the last norm;
            # a layer: attention 64 (64 + 64) + 64 x 64, SwiGLU 3 x 64 x 168, norms 2 x 64 + 32.
            ([], 2 * 1024 + 64 + 2 * (8192 + 4096 + 32256 + 160)),
            (["model.tied_embeddings=true"], 1024 + 64 + 2 * 44704),
            (["model.qk_layernorm=false"], 2048 + 64 + 2 * (44704 - 32)),
            (["model.make_vocab_size_divisible_by=1"], 2 * 12 * 64 + 64 + 2 * 44704),
        ],
    )
    def test_parameters(self, overrides: list[str], parameters: int) -> None:
        plan = dry_run.plan(compose(overrides), 1)
        assert f"tiny_qwen3, {parameters:,} parameters\n" in plan


class TestMemory:
    def test_a_run_that_cannot_fit_is_refused_with_the_numbers(
        self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train, "gpu_memory", lambda backend: 80_000_000_000)
        done = nemo_apo_command("train", "model=qwen3_8b", "run.dry_run=true")
        assert done.status == 2
        assert "parallel (TP x PP x CP)=1x1x1: a rank needs 1" in done.err
        assert "and its GPU has 80.0 GB" in done.err

    def test_one_that_fits_or_is_tried_all_the_same_is_not(
        self, nemo_apo_command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train, "gpu_memory", lambda backend: 80_000_000_000)
        assert nemo_apo_command("train", "run.dry_run=true").status == 0
        forced = ("model=qwen3_8b", "run.dry_run=true", "run.check_memory=false")
        assert nemo_apo_command("train", *forced).status == 0

    def test_without_a_gpu_there_is_no_bound(self) -> None:
        if not torch.cuda.is_available():
            assert train.gpu_memory("auto") is None
        assert train.gpu_memory("gloo") is None


class TestConfig:
    def test_what_it_prints_is_a_config_file(self, nemo_apo_command, tmp_path: Path) -> None:
        done = nemo_apo_command("config", "experiment=two_modes", "run.seed=5")
        saved = tmp_path / "saved.yaml"
        saved.write_text(done.out)
        assert compose([], config_file=saved) == compose(["experiment=two_modes", "run.seed=5"])

    def test_overrides_may_stand_on_both_sides_of_an_option(
        self, nemo_apo_command, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.yaml").write_text("run: {steps: 5}\n")
        done = nemo_apo_command("config", "run.seed=1", "--config", "mine.yaml", "run.seed=2")
        run = yaml.safe_load(done.out)["run"]
        assert (run["steps"], run["seed"]) == (5, 2)

    def test_groups_lists_every_option_on_a_line(self, nemo_apo_command) -> None:
        lines = nemo_apo_command("config", "--groups").out.splitlines()
        for group, options in group_options().items():
            assert f"{group}=" in lines
            for option, about in options.items():
                assert any(line.split() == [option, *about.split()] for line in lines)


class TestReport:
    @pytest.mark.parametrize(
        ("runs", "folder"),
        [(["runs/a"], "runs/a"), (["runs/a", "runs/b"], "runs/report"), (["x/a", "y/b"], "report")],
    )
    def test_where_it_goes_unless_told(
        self, runs: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        chosen = report.default_folder([Path(run) for run in runs])
        assert chosen.resolve() == (tmp_path / folder).resolve()

    def test_a_malformed_run_is_a_mistake_of_the_user(
        self, nemo_apo_command, tmp_path: Path
    ) -> None:
        (tmp_path / METRICS_FILE).write_text("not json\n")
        done = nemo_apo_command("report", ".")
        assert done.status == 2
        assert done.err.count("\n") == 1
