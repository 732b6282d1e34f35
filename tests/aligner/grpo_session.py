"""The real GRPO trainer on the real actor, with made rollouts or a sampler of the tests' own.

What is replaced is what a CPU cannot run: the inference backend and the graders' servers. Nothing
of the host or of nemo_apo is imported with this module (see ``tiny_actor``).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_apo.aligner.settings import BLOCK
from tests.aligner import shards, tiny_actor

PROMPT_WIDTH = 5


@dataclass(frozen=True)
class Case:
    """One way to run the same optimizer steps.

    Attributes:
        tp, pp, dp: the layout.
        micro_batch_size: of training.
        batch_size: sequences of an optimizer step over all ranks.
        prompts, group_size: of a rollout.
        apo: overrides of the shipped ``model.apo``, by dotted key.
        lr: of plain SGD, so that steps show the gradients.
        model: overrides of the tiny model's configuration, by dotted key.
        double: weights in float64.
        save_interval: RL steps between checkpoints, 0 for none.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch_size: int = 4
    batch_size: int = 8
    prompts: int = 4
    group_size: int = 4
    apo: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-2
    model: dict[str, Any] = field(default_factory=dict)
    double: bool = False
    save_interval: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


def apo_section(overrides: dict[str, Any]) -> DictConfig:
    """``model.apo`` as shipped, with overrides by dotted key."""
    section = OmegaConf.create(BLOCK.shipped())
    for key, value in overrides.items():
        OmegaConf.update(section, key, value, force_add=True)
    return section


def model_config(case: Case) -> DictConfig:
    """The actor's configuration of a case."""
    config = tiny_actor.tiny_config(
        "grpo",
        case.tp,
        case.pp,
        case.micro_batch_size,
        case.batch_size,
        **{"optim.lr": case.lr, **case.model},
    )
    # The host's loss keys, null as shipped.
    config.grpo = OmegaConf.merge(config.grpo, dict.fromkeys(_REPLACED))
    config.grpo.dapo = {"token_loss": None, "clip_higher": None}
    config.apo = apo_section(case.apo)
    return config


_REPLACED = ("ratio_eps", "ratio_eps_low", "ratio_eps_high", "initial_policy_kl_penalty")


def trainer_config(case: Case, folder: str = "", **changes: Any) -> DictConfig:
    """``trainer.grpo`` of a case."""
    return OmegaConf.merge(
        {
            "max_epochs": 1,
            "max_steps": 2,
            "val_check_interval": 0,
            "save_interval": 0,
            "gradient_clip_val": 1e6,
            "run_validation_step_0": False,
            "greedy_on_validation": True,
            "initial_policy_kl_penalty": None,
            "use_leave_one_out_baseline": None,
            "normalize_rewards": None,
            "importance_sample_correct": None,
            "length_penalty_enabled": False,
            "max_sequence_length": tiny_actor.SEQUENCE_LENGTH,
            "generation_rollout_mbs": 4,
            "prompt_micro_batch_size": 1,
            "num_prompts_per_grpo_step": case.prompts,
            "samples_per_prompt": case.group_size,
            "val_prompt_micro_batch_size": 1,
            "val_num_prompts_per_grpo_step": 2,
            "val_samples_per_prompt": 4,
            "generation_save_dir": folder,
            "rollout_batch_seq_length": None,
            "inference_backend": {"enable": False, "reshard": False},
            "model_gbs": case.batch_size,
            "model_mbs": case.micro_batch_size,
            "dapo": {"length_penalty": False},
        },
        changes,
    )


class Log:
    """The host's logger, in memory: prefix, step and numbers of every call."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        self.lines.append((prefix, step, dict(metrics)))

    def finalize(self) -> None:
        pass

    def column(self, prefix: str, name: str) -> list[float]:
        """All values logged under a name."""
        return [float(line[name]) for p, _, line in self.lines if p == prefix and name in line]


class Saver:
    """The host's checkpoint callback; ``save`` is called with its monitored values."""

    def __init__(self, save: Any = None) -> None:
        self.save = save

    def custom_save(self, monitor_candidates: dict[str, Tensor], is_train_end: bool) -> None:
        if self.save is not None:
            self.save(monitor_candidates)


@dataclass
class Session:
    """An actor and its trainer on this rank."""

    built: tiny_actor.Built
    trainer: Any
    log: Log

    @property
    def actor(self) -> Any:
        return self.built.actor


def open_session(
    case: Case,
    full_weights: dict[str, Tensor] | None = None,
    *,
    actor_class: type | None = None,
    generator: Any = None,
    dataset: list[dict[str, Any]] | None = None,
    folder: str = "",
    saver: Saver | None = None,
    **trainer_changes: Any,
) -> Session:
    """Build the actor (with the given weights) and the trainer of a case on this rank."""
    from nemo_aligner.utils.batch_iterators import GRPOBatchIterator
    from nemo_aligner.utils.distributed import Timer

    from nemo_apo.aligner.grpo import ApoGRPOActor
    from nemo_apo.aligner.grpo_trainer import ApoGRPOTrainer

    config = model_config(case)
    built = tiny_actor.build("grpo", config, case.world_size, actor_class or ApoGRPOActor)
    # Lightning gives a rank that is alone all cores; threads only slow so small a model down.
    torch.set_num_threads(1)
    if full_weights is not None:
        load_weights(built.actor, full_weights, case)
    if case.double:
        _use_double(built.actor)
    trainer_cfg = trainer_config(case, folder, **trainer_changes)
    if generator is not None:
        generator = generator(trainer_cfg, built.actor)
    log = Log()
    dataset = dataset or [{"text": torch.tensor([1, 2, 3])} for _ in range(64)]
    builder = _dataloader_builder(dataset, case.prompts)
    trainer = ApoGRPOTrainer(
        cfg=trainer_cfg,
        model=built.actor,
        optimizer=built.optimizer,
        scheduler=built.scheduler,
        train_dataloader_builder=builder,
        val_dataloader_builder=builder,
        collate_fn=collate,
        rollout_generator=generator,
        batch_iterator_cls=GRPOBatchIterator,
        logger=log,
        ckpt_callback=saver or Saver(),
        run_timer=Timer(None),
    )
    return Session(built, trainer, log)


def _use_double(actor: Any) -> None:
    """Weights in float64; NeMo's clipping asserts the type of gradients that it expects on CUDA."""
    actor.model.double()
    tiny_actor.refer_to_present_weights(actor)
    torch.cuda.FloatTensor = torch.DoubleTensor


def load_weights(actor: Any, full: dict[str, Tensor], case: Case) -> None:
    """This rank's part of the full weights, as policy and as reference."""
    from megatron.core import parallel_state

    shards.load_shard(
        actor,
        full,
        parallel_state.get_tensor_model_parallel_rank(),
        case.tp,
        parallel_state.get_pipeline_model_parallel_rank(),
        case.pp,
    )
    tiny_actor.refer_to_present_weights(actor)


def _dataloader_builder(dataset: list[Any], prompts: int) -> Any:
    from nemo.collections.nlp.data.language_modeling.megatron.data_samplers import (
        MegatronPretrainingRandomSampler,
    )

    def build(consumed_samples: int) -> Any:
        sampler = MegatronPretrainingRandomSampler(
            total_samples=len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=prompts,
            data_parallel_rank=0,
            data_parallel_size=1,
            global_batch_size=prompts,
            drop_last=True,
            seed=1,
        )
        return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    return build


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts padded to one width, as the branch's own collate function lays them out."""
    lengths = torch.tensor([len(item["text"]) for item in items])
    text = torch.zeros((len(items), PROMPT_WIDTH), dtype=torch.int64)
    for row, item in enumerate(items):
        text[row, : lengths[row]] = item["text"]
    return {
        "text": text,
        "length": lengths,
        "task_name": ["sort" for _ in items],
        "extra_verifier_info": [{} for _ in items],
    }


def made_rollout(case: Case, seed: int = 0, width: int = 16, interleaved: bool = True) -> Any:
    """A global rollout, the same on all ranks, without log-probs; groups cut across the ranks."""
    draw = torch.Generator().manual_seed(seed)
    count = case.prompts * case.group_size
    ids = torch.arange(case.prompts).repeat_interleave(case.group_size)
    if interleaved:
        ids = ids.view(case.prompts, case.group_size).t().reshape(-1)
    prompts = torch.randint(1, 250, (case.prompts, PROMPT_WIDTH), generator=draw)
    lengths = torch.randint(1, width - PROMPT_WIDTH + 1, (count,), generator=draw)
    tokens = torch.randint(1, 250, (count, width), generator=draw)
    tokens[:, :PROMPT_WIDTH] = prompts[ids]
    return {
        "apo_group_id": ids + 100,
        "text": prompts[ids],
        "response_tokens": tokens,
        "prompt_lengths": torch.full((count,), PROMPT_WIDTH),
        "response_lengths": PROMPT_WIDTH + lengths,
        "is_end": torch.ones(count, dtype=torch.bool),
        "rewards": torch.rand(count, generator=draw),
        "response_trt_lps": torch.zeros(count, width),
    }


def read_rollout(session: Session, rollout: dict[str, Any], case: Case) -> Any:
    """The rollout with log-probs, by the actor's own passes and the host's own gathering."""
    from megatron.core import parallel_state
    from nemo_aligner.experimental.grpo.experience.rollout_batch import GPTRolloutBatch

    batch = GPTRolloutBatch(rollout)
    local = batch.chunk(
        rank=parallel_state.get_data_parallel_rank(),
        split_size=parallel_state.get_data_parallel_world_size(),
    )
    tokens = local["response_tokens"]
    session.actor.prepare_for_inference()
    local["logprobs"] = session.actor.get_inference_log_probs(tokens)
    local["init_logprobs"] = session.actor.get_init_policy_logprobs(tokens)
    session.actor.finish_inference()
    return local.gather_and_balance_globally()


def train_on(session: Session, rollout: Any, case: Case) -> list[dict[str, Tensor]]:
    """One RL step on a read rollout; the gradients of this rank at every optimizer step."""
    data, _ = session.trainer.create_grpo_training_data_from_inferences(rollout)
    return train_batches(session, batches_of(data, case))


def batches_of(data: dict[str, Any], case: Case) -> list[dict[str, Any]]:
    """This rank's training data, cut into optimizer steps as the host cuts them."""
    from nemo.collections.nlp.modules.common.megatron.utils import get_iterator_k_split

    local = case.batch_size // case.dp
    return list(get_iterator_k_split(data, data["response_tokens"].shape[0] // local))


def train_batches(session: Session, batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Train on the batches; the gradients of this rank at every optimizer step."""
    seen: list[dict[str, Tensor]] = []
    step = session.built.optimizer.step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        seen.append(shards.gradients(session.actor))
        return step(*args, **kwargs)

    session.built.optimizer.step = watched_step
    try:
        session.trainer.run_training(iter(batches))
    finally:
        session.built.optimizer.step = step
    return seen
