"""Jobs on a real Slurm of three nodes: trained, stopped, preempted, lost, swept."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from nemo_apo import record
from tests.abuse.effort import IS_LONG, report

from . import jobs
from .cluster import LocalSlurm

pytestmark = pytest.mark.slow(reason="trains in jobs of a real Slurm")

SCHEDULE = ("schedule=guarded", "schedule.alpha_min=0.35", "schedule.alpha_max=0.4")
CANARIES = ("canary-in-the-file-0123", "canary-of-the-shell-4567")
# When a run is disturbed: after the metrics of this step, or None as soon as its job's script runs.
MOMENTS = [2, None, 0, 7, 15] if IS_LONG else [2]


@pytest.fixture(scope="module")
def whole(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run on two nodes, with its job's nodes checked first."""
    folder = tmp_path_factory.mktemp("whole")
    secrets = folder / "secrets.env"
    secrets.write_text(f"HF_TOKEN={CANARIES[0]}\n")
    arguments = ("run.name=whole", "cluster.doctor=true", "run.report=true", "--follow", *SCHEDULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", CANARIES[1])
        done = jobs.launch(folder, *arguments, f"cluster.env_file={secrets}")
    assert done.returncode == 0, done.stdout + done.stderr + jobs.logs(folder)
    assert "RUNNING" in done.stdout
    assert "COMPLETED, status 0" in done.stdout
    return folder / "runs" / "whole"


def disturbed(tmp_path: Path, moment: int | None, *arguments: str) -> tuple[str, Path]:
    """A job of the same training, and its run folder, at the moment."""
    job = jobs.launched(tmp_path, "run.name=run", *SCHEDULE, *arguments)
    folder = tmp_path / "runs" / "run"
    # Slurm says RUNNING before the script runs, and drops a signal to it until then.
    jobs.wait_until(lambda: "start 0: nodes" in jobs.logs(tmp_path), "the start", tmp_path)
    if moment is not None:
        jobs.wait_for_step(folder, moment)
    return job, folder


def is_the_whole_run(job: str, folder: Path, whole: Path, restarts: int = 1) -> None:
    found = jobs.wait_for(job, folder, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    told = jobs.logs(folder)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), told
    assert int(found["Restarts"]) == restarts, told
    assert jobs.metrics(folder) == jobs.metrics(whole)


def test_two_nodes_train_with_the_schedule_that_was_asked_for(whole: Path) -> None:
    summary = json.loads((whole / record.SUMMARY_FILE).read_text())
    assert (summary["world_size"], summary["data_parallel_size"]) == (2, 2)
    alphas = [line[record.ALPHA] for line in jobs.metrics(whole) if record.ALPHA in line]
    assert len(alphas) == 24
    assert alphas[0] == pytest.approx(0.4)
    assert all(0.35 <= alpha <= 0.4 for alpha in alphas)
    assert (whole / record.REPORT_HTML).is_file()
    (doctor,) = whole.glob("slurm/*/*/start0-doctor-node0.log")
    told = doctor.read_text()
    rows = re.findall(r"^(ok|warning|FAILURE) +(.+?)  ", told, re.MULTILINE)
    level_of = {check: level for level, check in rows}
    for check in ("versions", "clock", "shared folder", "gloo"):
        assert level_of[check] == "ok", told
    # A machine with a nearly full disk is warned of.
    assert level_of["disk"] in ("ok", "warning"), told
    assert "127.0.0.11,127.0.0.12" in told


def test_secrets_reach_the_tasks_and_nothing_else(slurm: LocalSlurm, whole: Path) -> None:
    (doctor,) = whole.glob("slurm/*/*/start0-doctor-node0.log")
    assert "HF_TOKEN is set" in doctor.read_text()
    assert "WANDB_API_KEY is not set" in doctor.read_text()
    files = [path for root in (slurm.root, whole) for path in root.rglob("*") if path.is_file()]
    assert {"job.sbatch", "slurmctld.log", "config.yaml"} <= {path.name for path in files}
    content = b"".join(path.read_bytes() for path in files)
    assert [canary for canary in CANARIES if canary.encode() in content] == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_usr1_saves_requeues_and_resumes(
    moment: int | None, slurm: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    job, folder = disturbed(tmp_path, moment)
    # What --signal=B:USR1@N sends: to the batch script alone.
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    is_the_whole_run(job, folder, whole)
    if moment:
        assert "stopped early: signal USR1" in jobs.logs(folder)
        assert "resumed from" in jobs.logs(folder)
    report(f"USR1 at {moment}", 1)


def preempt(tmp_path: Path) -> None:
    """Run a job that needs all nodes and goes before the others."""
    urgent = ["sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null"]
    done = subprocess.run([*urgent, "--wrap=sleep 3"], check=True, capture_output=True, text=True)
    jobs.wait_for(done.stdout.strip(), tmp_path, "COMPLETED")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_preempted_run_is_completed_later(
    moment: int | None, slurm: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    job, folder = disturbed(tmp_path, moment, "cluster.exclusive=true")
    preempt(tmp_path)
    assert jobs.fields(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETED")
    is_the_whole_run(job, folder, whole)
    if moment:
        assert "resumed from" in jobs.logs(folder)
    report(f"preemption at {moment}", 1)


@pytest.mark.parametrize("moment", MOMENTS)
def test_preemption_without_time_to_save_costs_what_was_not_saved(
    moment: int | None, slurm: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    arguments = ("cluster.partition=abrupt", "cluster.exclusive=true", "run.save_every=1")
    job, folder = disturbed(tmp_path, moment, *arguments)
    # Between TERM and KILL are the seconds of KillWait, in which these ranks would save.
    with slurm.standstill(job):
        preempt(tmp_path)
    is_the_whole_run(job, folder, whole)
    if moment:
        assert "stopped early" not in jobs.logs(folder)
        assert "resumed from" in jobs.logs(folder)
    report(f"abrupt preemption at {moment}", 1)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_lost_node_is_survived(
    moment: int | None, slurm: LocalSlurm, whole: Path, tmp_path: Path
) -> None:
    job, folder = disturbed(tmp_path, moment, "run.save_every=1")
    slurm.kill_node("127.0.0.12")
    try:
        is_the_whole_run(job, folder, whole)
    finally:
        slurm.start_node("127.0.0.12")
    assert "127.0.0.13" in jobs.logs(folder)
    report(f"lost node at {moment}", 1)


def test_the_next_job_of_a_chain_goes_on(slurm: LocalSlurm, whole: Path, tmp_path: Path) -> None:
    job, folder = disturbed(tmp_path, 2, "cluster.chain=3")
    chain = [job, *(str(int(job) + number) for number in (1, 2))]
    assert jobs.fields(chain[1])["Dependency"].startswith("singleton")
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    found = [jobs.wait_for(one, folder, "COMPLETED", "FAILED", "CANCELLED") for one in chain]
    assert [one["ExitCode"] for one in found] == ["75:0", "0:0", "0:0"], jobs.logs(folder)
    assert [one["Restarts"] for one in found] == ["0", "0", "0"]
    assert jobs.metrics(folder) == jobs.metrics(whole)


def test_starts_without_progress_end_the_job(slurm: LocalSlurm, tmp_path: Path) -> None:
    job, folder = disturbed(tmp_path, None, "cluster.stalled_starts=1")
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    found = jobs.wait_for(job, folder, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "76:0", "1")
    assert "without a new checkpoint" in jobs.logs(folder)


def test_a_finished_run_is_not_begun_again(slurm: LocalSlurm, whole: Path) -> None:
    (launch_folder,) = (path for path in whole.glob("slurm/*") if path.is_dir())
    before = jobs.metrics(whole)
    done = subprocess.run(
        ["sbatch", "--parsable", str(launch_folder / "job.sbatch")], capture_output=True, text=True
    )
    found = jobs.wait_for(done.stdout.strip(), whole, "COMPLETED", "FAILED")
    assert found["ExitCode"] == "0:0"
    assert "has ended with status 0" in jobs.logs(launch_folder)
    assert jobs.metrics(whole) == before


def test_the_quickstart_on_two_nodes(slurm: LocalSlurm, tmp_path: Path) -> None:
    arguments = ("run.name=quickstart", "parallel=tp2", "schedule.alpha_min=0.6", "--follow")
    done = jobs.launch(tmp_path, *arguments, training=())
    assert done.returncode == 0, done.stdout + done.stderr + jobs.logs(tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    summary = json.loads((folder / record.SUMMARY_FILE).read_text())
    assert (summary["world_size"], summary["tensor_model_parallel_size"]) == (2, 2)
    assert summary["accuracy_start"] < 0.3
    assert summary["accuracy_final"] > 0.9
    lines = [line for line in jobs.metrics(folder) if record.ALPHA in line]
    for before, line in pairwise(lines):
        lowered = (0.9 - 0.6) * line[record.CONFIDENCE] * line[record.IMPROVEMENT]
        expected = 0.8 * before[record.ALPHA] + 0.2 * (0.9 - lowered)
        assert line[record.ALPHA] == pytest.approx(expected)
    assert (lines[0][record.ALPHA], len(lines)) == (0.9, 60)
    assert lines[-1][record.ALPHA] == summary["alpha_last"] == pytest.approx(0.73, abs=0.05)


def test_the_script_without_the_launcher(slurm: LocalSlurm, whole: Path, tmp_path: Path) -> None:
    script = jobs.REPOSITORY / "scripts" / "slurm" / "trainer.sbatch"
    options = ["--nodes=2", "--gpus-per-node=0", "--time=10", "--signal=B:USR1@60"]
    given = {
        "PYTHON": sys.executable,
        "RANKS_PER_NODE": "1",
        "PYTHONPATH": str(jobs.REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["sbatch", "--parsable", *options, script, *jobs.TRAINING, *SCHEDULE, "run.name=run"],
        cwd=tmp_path,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job, folder = done.stdout.strip(), tmp_path / "runs" / "run"
    jobs.wait_for_step(folder, 2)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    found = jobs.wait_for(job, tmp_path, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    told = jobs.logs(tmp_path)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), told
    assert found["Restarts"] == "1"
    assert "stopped early: signal USR1" in told
    assert jobs.metrics(folder) == jobs.metrics(whole)


def test_a_sweep_is_an_array_with_its_report(slurm: LocalSlurm, tmp_path: Path) -> None:
    done = jobs.launch(
        tmp_path,
        *("--sweep", "--follow", "objective=apo,gspo", "run.seed=0,1,2"),
        *("cluster.nodes=1", "run.name=compared", "run.steps=2", "warm_start.steps=2"),
    )
    assert done.returncode == 0, done.stdout + done.stderr + jobs.logs(tmp_path)
    folder = tmp_path / "runs" / "compared"
    runs = sorted(path.parent.name for path in folder.glob("*/summary.json"))
    names = [f"objective-{name}_seed-{seed}" for name in ("apo", "gspo") for seed in range(3)]
    assert runs == names
    page = (folder / record.REPORT_HTML).read_text()
    assert all(name in page for name in names)


def test_what_slurm_refuses_is_a_users_mistake(slurm: LocalSlurm, tmp_path: Path) -> None:
    done = jobs.launch(tmp_path, "cluster.partition=nope")
    assert done.returncode == 2
    assert "Slurm would not take the job" in done.stderr
    assert "Invalid partition" in done.stderr or "invalid partition" in done.stderr
    assert jobs.launch(tmp_path, "cluster.time=9-00:00:00").returncode == 2
    assert jobs.launch(tmp_path, "cluster.nodes=4", "rollout.prompts=8").returncode == 2
    assert not list(tmp_path.rglob("*.sbatch"))
