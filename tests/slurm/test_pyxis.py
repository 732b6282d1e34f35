"""Scripts for pyxis on a real Slurm, with a plugin in its place that takes its options."""

import os
import subprocess
from pathlib import Path

import pytest

from . import jobs
from .cluster import LocalSlurm

pytestmark = pytest.mark.slow(reason="runs jobs of a real Slurm")

# What is run in the place of Python, to show what it was given.
SHOW = """\
#!/bin/bash
echo "arguments: $*"
env | grep -E "^(STUB_|MASTER_|SLURM_PROCID|SLURM_NTASKS|HF_TOKEN|RANK)"
"""


@pytest.fixture
def python(slurm: LocalSlurm, tmp_path: Path) -> Path:
    if not slurm.has_pyxis:
        assert os.environ.get("CI") != "1"
        pytest.skip("the plugin cannot be compiled: apt-get install gcc libslurm-dev, or CI=1")
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(SHOW)
    path.chmod(0o755)
    return path


def test_a_launched_job_hands_over_image_and_mounts(python: Path, tmp_path: Path) -> None:
    done = jobs.launch(
        tmp_path,
        *("cluster=pyxis", "cluster.container='nvcr.io#nvidia/nemo:25.04'", "cluster.mem=null"),
        *("cluster.mounts=[/tmp:/data]", "cluster.processes_per_node=null"),
        *("cluster.gpus_per_node=8", f"cluster.python={python}", "run.name=run", "--follow"),
    )
    told = jobs.logs(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + told
    assert "STUB_container_image=nvcr.io#nvidia/nemo:25.04" in told
    assert f"STUB_container_mounts=/tmp:/data,{tmp_path}:{tmp_path}\n" in told
    assert f"STUB_container_workdir={tmp_path}" in told
    assert "arguments: -m nemo_apo.launch.node 8 train experiment=smoke" in told
    assert "image nvcr.io#nvidia/nemo:25.04" in told


def test_the_script_for_nemo_aligner(python: Path, slurm: LocalSlurm, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=for-the-tasks\n")
    results = tmp_path / "results"
    given = {
        "IMAGE": "nemo.sqsh",
        "MODEL": "/models/m.nemo",
        "TRAIN": "/data/train.jsonl",
        "VALIDATION": "/data/val.jsonl",
        "RESULTS": str(results),
        "SECRETS": str(secrets),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    script = jobs.REPOSITORY / "scripts" / "slurm" / "nemo_aligner.sbatch"
    command = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--mem=100",
        "--time=5",
        f"--export={','.join(given)}",
    ]
    done = subprocess.run(
        [*command, str(script), "+recipe=qwen2.5_7b", "+nodes=n2"],
        cwd=tmp_path,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = jobs.wait_for(done.stdout.strip(), tmp_path, "COMPLETED", "FAILED", "CANCELLED")
    told = jobs.logs(tmp_path)
    assert found["ExitCode"] == "0:0", told
    outputs = [path.read_text() for path in results.glob("slurm/*/*.log")]
    assert sorted(text.split("SLURM_PROCID=")[1].split()[0] for text in outputs) == sorted(
        str(rank) for rank in range(16)
    )
    for text in outputs:
        assert "-m nemo_apo.aligner.train_gpt_apo +recipe=qwen2.5_7b +nodes=n2" in text
        assert "model.data.data_prefix={train: [/data/train.jsonl]," in text
        assert "STUB_container_image=nemo.sqsh" in text
        assert "MASTER_ADDR=127.0.0.11" in text
        assert "HF_TOKEN=for-the-tasks" in text
