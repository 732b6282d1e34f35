"""The example job script: what it hands to NeMo-RL's ``ray.sub``, and what that would run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "slurm" / "nemo_rl.sbatch"
NEEDED = ("IMAGE", "RAY_SUB", "PACKAGE", "DATA", "MODELS", "RESULTS")
# Stands for ray.sub: runs COMMAND from a file, as that does in the first node's container.
RAY_SUB = """
printf '%s\\n' "$CONTAINER" "$MOUNTS" "$BASE_LOG_DIR" "$SLURM_SUBMIT_DIR" "$SLURM_EXPORT_ENV"
printf '%s' "$COMMAND" > "$BASE_LOG_DIR/command.sh"
bash "$BASE_LOG_DIR/command.sh"
"""
UV = """#!/bin/sh
echo "$PWD"
echo "$PYTHONPATH"
echo "${TOKEN:-none}"
for argument; do printf '%s\\n' "$argument"; done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A job's, in which ``uv`` tells what it was called with."""
    (tmp_path / "ray.sub").write_text(RAY_SUB)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(UV)
    (tmp_path / "bin" / "uv").chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "NEMO_RL_FOLDER": str(tmp_path),
        "IMAGE": "nemo-rl.sqsh",
        "RAY_SUB": str(tmp_path / "ray.sub"),
        "PACKAGE": "/opt/our package",
        "DATA": "/data",
        "MODELS": "/models",
        "RESULTS": str(tmp_path / "results"),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_what_ray_sub_gets(environment: dict[str, str], tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN=kept-apart\n")
    overrides = ["checkpointing.checkpoint_must_save_by='00:03:45:00'", "apo.tau={base: 0.5}"]
    done = run({**environment, "SECRETS": str(secrets)}, "--config", "mine", *overrides)
    assert done.returncode == 0, done.stderr
    results = environment["RESULTS"]
    container, mounts, logs, folder, exported, *called = done.stdout.splitlines()
    assert (container, exported) == ("nemo-rl.sqsh", "ALL")
    mounted = ["/opt/our package", "/data", "/models", results]
    assert mounts == ",".join(f"{path}:{path}" for path in mounted)
    assert (logs, folder) == (f"{results}/slurm", results)
    assert called[:3] == [str(tmp_path), "/opt/our package", "kept-apart"]
    assert called[3:] == [
        *("run", "python", "-m", "nemo_apo.nemo_rl.run_grpo", "--config", "mine"),
        *overrides,
        "cluster.num_nodes=2",
        "cluster.gpus_per_node=8",
        f"checkpointing.checkpoint_dir={results}/checkpoints",
        f"logger.log_dir={results}/logs",
    ]
    command = Path(f"{results}/slurm/command.sh").read_text()
    assert "kept-apart" not in command, "tokens are read where they are used"
    assert shlex.quote(str(secrets)) in command


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_not_said_is_asked_for(name: str, environment: dict[str, str]) -> None:
    del environment[name]
    done = run(environment, "--config", "mine")
    assert done.returncode != 0
    assert name in done.stderr
    assert done.stdout == ""
