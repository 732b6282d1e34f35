"""A run of the launcher on the host's own ``setup`` and ``grpo_train``: sums of small numbers.

Everything is the host's: dataset and dataloader, math environment, advantages, workers, logger,
checkpoints. Only the generation engine is replaced (``hf_generation``).
"""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_apo.nemo_rl import run_grpo
from tests.nemo_rl import cluster, hf_generation, host_config, host_source

PROMPTS_PER_STEP = 4


@dataclass
class Ran:
    """What a run left behind.

    Attributes:
        folder: of checkpoints and logs.
        weights: of the policy at its end.
    """

    folder: Path
    weights: dict[str, torch.Tensor]

    def logged(self, name: str) -> dict[int, float]:
        """The values of a metric in the host's TensorBoard files, by step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        values = {}
        for file in sorted((self.folder / "logs").rglob("events.out.tfevents.*")):
            events = EventAccumulator(str(file))
            events.Reload()
            if name in events.Tags()["scalars"]:
                values |= {event.step: event.value for event in events.Scalars(name)}
        return values

    def state(self, step: int) -> dict[str, Any]:
        """Our state in the checkpoint of a step."""
        return json.loads((self.checkpoint(step) / "policy" / "nemo_apo.json").read_text())

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step}"


def overrides(folder: Path, steps: int, backend: int) -> list[str]:
    """Of the host's example, for a run in a folder."""
    data = _write_sums(folder / "sums.jsonl")
    return [
        *host_config.backend(backend),
        f"grpo.num_prompts_per_step={PROMPTS_PER_STEP}",
        f"grpo.max_num_steps={steps}",
        "grpo.max_num_epochs=10",
        "grpo.val_period=0",
        "data.max_input_seq_length=32",
        "data.num_workers=0",
        "data.train.dataset_name=ResponseDataset",
        f"+data.train.data_path={data}",
        "data.train.split_validation_size=0",
        "data.default.prompt_file=null",
        "env.math.num_workers=1",
        "logger.tensorboard_enabled=true",
        "logger.monitor_gpus=false",
        f"logger.log_dir={folder}/logs",
        f"checkpointing.checkpoint_dir={folder}/checkpoints",
        "checkpointing.metric_name=null",
        "checkpointing.keep_top_k=10",
        "checkpointing.save_period=1",
        *(["checkpointing.model_save_format=null"] if backend == 1 else []),
    ]


def _write_sums(path: Path) -> Path:
    sums = [{"input": f"{a}+{b}=", "output": str(a + b)} for a in range(5) for b in range(4)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in sums))
    return path


def run(model: str, folder: Path, steps: int, backend: int, *further: str) -> Ran:
    """Train up to a number of RL steps, from the last checkpoint of the folder if it has one."""
    example = host_source.checkout() / host_config.EXAMPLE
    changes = [*host_config.changes(model), *overrides(folder, steps, backend), *further]
    # The host's clusters give their slots back when they are collected.
    gc.collect()
    with _on_cpus() as policies:
        run_grpo.main(["--config", str(example), *changes])
        weights = policies[0].weights()
        policies[0].shutdown()
    return Ran(folder, weights)


@contextmanager
def _on_cpus() -> Iterator[list[Any]]:
    """The host with what is not here replaced; the policies that it makes."""
    from nemo_rl.algorithms import grpo
    from nemo_rl.distributed import virtual_cluster
    from nemo_rl.models.policy import lm_policy

    policies = []

    class Watched(cluster.probed(lm_policy.Policy)):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            policies.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_policy, "Policy", Watched)
        patch.setattr(grpo, "VllmGeneration", hf_generation.Generation)
        patch.setattr(grpo, "refit_policy_generation", hf_generation.refit)
        # Ray is there already, with the CPU shims in its processes.
        patch.setattr(virtual_cluster, "init_ray", lambda: None)
        # The launcher adds to it for the workers.
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        torch.manual_seed(0)
        yield policies
