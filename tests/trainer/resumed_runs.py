"""Runs that are stopped, killed and resumed, and what is compared of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config, EvaluationConfig, RunConfig, WarmStartConfig
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint_search import newest_verified
from nemo_apo.trainer.loop import run
from nemo_apo.trainer.policy import Policy
from tests.parallel.ranks import run_ranks

from .tiny_runs import begin

STEPS = 6


def prepared(config: Config, root: Path, name: str, **changes: Any) -> Config:
    run_config = RunConfig(
        name=name,
        root=str(root),
        steps=STEPS,
        save_every=STEPS,
        console="off",
        tensorboard=False,
        report=False,
    )
    return replace(
        config,
        run=replace(run_config, **changes),
        warm_start=WarmStartConfig(steps=10, batch_size=8),
        evaluation=EvaluationConfig(every=2, prompts=8, pass_prompts=4, pass_k=2),
    )


def ranks_of(config: Config, data: int = 1) -> int:
    """Ranks of a layout with ``data`` data-parallel replicas."""
    layout = config.parallel
    model_ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return model_ranks * layout.context_parallel_size * data


def train(config: Config, data: int = 1) -> None:
    run_ranks(ranks_of(config, data), run, config)


def metrics(root: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock measured."""
    text = (root / name / record.METRICS_FILE).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith("time/") and key != record.TOKENS_PER_SECOND
        }
        for line in lines
    ]


def moments(policy: Policy) -> list[Tensor]:
    """Adam's moments, main weights and step counts on this rank."""
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    kept = []
    for part in parts:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                kept += [parameter, *(state[name] for name in sorted(state))]
    return [torch.as_tensor(value).detach().clone() for value in kept]


def checkpoint_at_the_end(config: Config, data: int = 1) -> list[tuple[list[Tensor], dict]]:
    """Weights, optimizer and remembered weights of each rank, and the trainer's state."""

    def load() -> tuple[list[Tensor], dict[str, Any]]:
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
        training = begin(config, layout)
        found = newest_verified(Path(config.run.root) / config.run.name / record.CHECKPOINT_DIR)
        assert found is not None
        assert found.newest.folder.name == f"step_{config.run.steps:06d}"
        state, _ = checkpoint.load(found.newest, training.policy, training.remembered, config)
        adam = moments(training.policy)
        assert adam
        remembered = [
            *(training.remembered.reference or []),
            *(training.remembered.anchor or []),
        ]
        tensors = [*training.policy.copy_weights(), *adam, *remembered]
        return [value.clone() for value in tensors], state.state_dict()

    return run_ranks(ranks_of(config, data), load)
