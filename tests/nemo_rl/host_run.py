"""A run of the host's own ``setup`` and ``grpo_train`` under APO, on sums of small numbers.

Everything is the host's: dataset and dataloader, math environment, advantages, workers, logger,
checkpoints. Only the generation engine is replaced (``hf_generation``).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nemo_rl import cluster, hf_generation, host_config

PROMPTS_PER_STEP = 4


@dataclass
class Ran:
    """What a run left behind.

    Attributes:
        folder: of checkpoints and logs.
        weights: of the policy at its end.
        reported: lines told to a person.
    """

    folder: Path
    weights: dict[str, torch.Tensor]
    reported: list[str]

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
    from nemo_rl.algorithms import grpo
    from nemo_rl.data.utils import setup_response_data

    config = host_config.master_config(model, *overrides(folder, steps, backend), *further)
    tokenizer = hf_generation.tiny_model.load_tokenizer(model)
    torch.manual_seed(0)
    data, validation, environments, _ = setup_response_data(tokenizer, config.data, config.env)
    reported: list[str] = []
    with _generation_replaced(grpo), _ending(environments):
        factory, loss, wrap_logger = apo_parts(config, reported.append)
        (policy, generation, _, placed, loader, val_loader, _, logger, saver, state, config, _, _) = (
            grpo.setup(config, tokenizer, data, validation, policy_factory=factory)
        )
        try:
            grpo.grpo_train(
                policy,
                generation,
                loader,
                val_loader,
                tokenizer,
                loss,
                environments,
                None,
                wrap_logger(logger),
                saver,
                state,
                config,
            )
            return Ran(folder, policy.weights(), reported)
        finally:
            policy.shutdown()
            for one in set(placed):
                one.shutdown()


def apo_parts(config: Any, report: Any) -> tuple[Any, Any, Any]:
    """The policy factory, the loss and the logger's wrapper of a configuration."""
    from nemo_rl.models.policy.lm_policy import Policy

    from nemo_apo.nemo_rl.baselines import ApoLogger, Baselines
    from nemo_apo.nemo_rl.loss import ApoLoss
    from nemo_apo.nemo_rl.policy import ApoRun, RunSizes, policy_factory
    from nemo_apo.nemo_rl.settings import read_settings

    settings = read_settings(config.model_extra.get("apo"))
    sizes = RunSizes(
        group_size=config.grpo.num_generations_per_prompt,
        total_steps=config.grpo.max_num_steps,
        max_response_length=config.policy["generation"]["max_new_tokens"],
    )
    apo = ApoRun(settings, sizes, Baselines(), report)
    return (
        policy_factory(apo, cluster.probed(Policy)),
        ApoLoss(settings.objective, settings.regularizers),
        lambda logger: ApoLogger(logger, apo.baselines),
    )


@contextmanager
def _generation_replaced(grpo: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "VllmGeneration", hf_generation.Generation)
        patch.setattr(grpo, "refit_policy_generation", hf_generation.refit)
        yield


@contextmanager
def _ending(environments: dict[str, Any]) -> Iterator[None]:
    """End the actors of the environments, which hold slots of Ray."""
    import ray

    try:
        yield
    finally:
        for actor in set(environments.values()):
            ray.get(actor.shutdown.remote())
            ray.kill(actor)
