"""``nemo-apo launch slurm``: the script against a golden file, and what is refused before Slurm."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_apo.cli import main
from nemo_apo.launch.script import image_digest

HERE = Path(__file__).parent
GOLDEN = {
    "single": [
        "cluster.nodes=4",
        "cluster.partition=h100",
        "cluster.account=rl",
        "cluster.env_file=ENV",
        "cluster.cpus_per_task=64",
        "cluster.environment=['NCCL_DEBUG=WARN','NCCL_IB_HCA=mlx5']",
        "cluster.extra_sbatch=['--constraint=ib']",
        "experiment=smoke",
        "run.max_time='01:00:00'",
    ],
    "container": [
        "cluster=pyxis",
        f"cluster.container=nvcr.io/nvidia/nemo@sha256:{'0123456789abcdef' * 4}",
        "cluster.mounts=[/data:/data:ro]",
        "cluster.chain=3",
        "run.wandb=true",
    ],
    "sweep": [
        "--sweep",
        "cluster=cpu",
        "objective=apo,gspo",
        "run.seed=0,1,2",
        "run.name=compared",
    ],
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets.env").write_text("HF_TOKEN=canary-in-the-file\n")


def script_of(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The script as it is printed, without what depends on place and time."""
    arguments = [text.replace("ENV", f"{folder}/secrets.env") for text in arguments]
    command = ["launch", "slurm", "--dry-run", "cluster.python=/opt/venv/bin/python", *arguments]
    assert main(command) == 0
    text = capsys.readouterr().out
    return re.sub(r"\d{8}-\d{6}", "LAUNCHED", text.replace(str(folder), "/work"))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_script_is_the_golden_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script_of(GOLDEN[name], tmp_path, capsys)
    golden = HERE / f"{name}.sbatch"
    if os.environ.get("NEMO_APO_WRITE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text()


def faults(script: str) -> str:
    """What shellcheck says of a script."""
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: bash -n alone has read the script")
    command = [shellcheck, "--shell=bash", "-"]
    return subprocess.run(command, input=script, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", GOLDEN)
def test_the_script_is_sound_shell(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script_of(GOLDEN[name], tmp_path, capsys)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert faults(text) == ""


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["launch", "slurm", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=cpu", "cluster.processes_per_node=3", "parallel=tp2"], "1 nodes x 3 ranks"),
        (["cluster=cpu", "run.steps=0"], "run.steps=0"),
        (["cluster=cpu", "run.stepz=3"], "did you mean run.steps"),
        (["cluster=cpu", "run.seed=0,1"], "takes one value"),
        (["cluster=cpu", "run.dry_run=true"], "would train nothing"),
        (["cluster=cpu", "parallel.backend=nccl"], "needs GPUs"),
        (["cluster=cpu", "grading.grader=nowhere:f", "grading.workers=1"], "nowhere"),
        (["cluster=cpu", "run.root='a b'"], "letters, digits"),
        (["--sweep", "cluster=cpu", "objective=apo,gspoo"], "did you mean gspo"),
        (["cluster.gpu=h100", "model=qwen3_32b", "cluster.gpus_per_node=1"], "the GPU has"),
    ],
)
def test_refused_before_slurm_is_asked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(capsys, *arguments, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_layout_needs_the_ranks_of_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    four = ["cluster=cpu", "parallel=tp2_pp2", "--dry-run"]
    assert "1 nodes x 2 ranks" in refusal(capsys, *four)
    assert main(["launch", "slurm", *four, "cluster.nodes=2"]) == 0


def test_a_folder_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert "already holds a run" in refusal(capsys, "cluster=cpu", "--dry-run")
    assert main(["launch", "slurm", "cluster=cpu", "run.if_exists=resume", "--dry-run"]) == 0


def test_secrets_do_not_reach_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    text = script_of(GOLDEN["single"], tmp_path, capsys)
    assert "canary" not in text
    told = refusal(
        capsys, "cluster=cpu", "cluster.environment=['A=canary-0123456789']", "--dry-run"
    )
    assert "HF_TOKEN" in told
    assert "canary" not in told


def test_files_are_named_by_their_whole_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("run:\n  name: mine\n")
    text = script_of(["--config", "mine.yaml", "cluster=cpu"], tmp_path, capsys)
    assert "arguments=(\n    --config=/work/mine.yaml\n)\nrun_folder=/work/runs/mine\n" in text


def test_the_digest_of_an_image() -> None:
    digest = f"sha256:{'0123456789abcdef' * 4}"
    assert image_digest(f"nvcr.io#nvidia/nemo@{digest}") == digest
    assert image_digest("nvcr.io#nvidia/nemo:25.04") is None
    assert image_digest(None) is None


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of sbatch that notes what it is asked."""
    path = tmp_path / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text("#!/bin/bash\necho $1 >>${0%/*}/asked\n[[ $1 == --test-only ]] || echo 7\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def test_the_record_of_a_launch(
    sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", "cluster=cpu", "cluster.chain=2"]) == 0
    asked = (sbatch.parent / "asked").read_text().split()
    assert asked == ["--test-only", "--parsable", "--parsable"]
    (record,) = tmp_path.glob("runs/quickstart/slurm/*/launch.json")
    written = json.loads(record.read_text())
    assert written["jobs"] == ["7", "7"]
    assert written["ranks"] == 2
    assert (record.parent / "job.sbatch").read_text().count("--dependency=singleton") == 1
    assert str(record.parent) in capsys.readouterr().out


def test_the_report_of_a_sweep_waits_for_its_runs(sbatch: Path, tmp_path: Path) -> None:
    assert main(["launch", "slurm", "--sweep", "cluster=cpu", "run.seed=0,1"]) == 0
    (script,) = tmp_path.glob("runs/quickstart/slurm/*/report.sbatch")
    text = script.read_text()
    assert "#SBATCH --dependency=afterany:7\n" in text
    assert f"    {tmp_path}/runs/quickstart/seed-0\n    {tmp_path}/runs/quickstart/seed-1\n" in text
    assert faults(text) == ""


def test_jobs_that_were_submitted_are_cancelled_if_the_next_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    for name, body in {
        "sbatch": "echo 7; [[ $1 == --test-only || ! -e ${0%/*}/full ]] || exit 1; "
        "[[ $1 == --test-only ]] || touch ${0%/*}/full",
        "scancel": "echo $* >${0%/*}/cancelled",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    refusal(capsys, "cluster=cpu", "cluster.chain=2")
    assert (tmp_path / "bin" / "cancelled").read_text() == "7\n"
