"""Train with APO on NeMo-Aligner's branch ``llama-nemotron-dev``.

    python -m nemo_apo.aligner.train_gpt_apo +recipe=qwen2.5_7b +nodes=n2 \\
        pretrained_checkpoint.restore_from_path=MODEL \\
        model.data.data_prefix.train='[TRAIN]' model.data.data_prefix.validation='[VALIDATION]'

Started on every rank, as the host's own script. Hydra composes ``conf/aligner/gpt_apo.yaml``;
``--cfg job`` prints the result without anything of the host's. The configuration is checked first,
then whether the host is the one that this package knows, and only then does a run begin: a mistake
ends every rank with status 2 and one sentence.
"""

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_apo.aligner import host_rules, interface_guard
from nemo_apo.aligner.settings import SHIPPED, read_settings
from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import first_line
from nemo_apo.config import ConfigError, require
from nemo_apo.plugin.interface_guard import InterfaceMismatch, Needed
from nemo_apo.plugin.settings import ApoSettings

USER_ERROR = 2
# What launchers call the number of a rank.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID")

# A prompt's task name decides who grades it: here, the section of trainer.grpo.environments.
ENVIRONMENT_OF_TASK: Mapping[str, str] = {
    "aime24": "math",
    "amc23": "math",
    "math": "math",
    "qwq_sol_gen_no_ans_c4": "math",
    "qwq_sol_gen_no_ans_c7": "math",
    "qwq_sol_gen_no_ans_olymp_pr_gt03": "math",
    "qwq_sol_gen_no_ans_olymp_pr_lt03": "math",
    "llm_judge_gpqa": "llm_judge",
    "llm_judge_scp116k": "llm_judge",
    "llm_judge_supergpqa": "llm_judge",
    "llm_judge_aime24": "llm_judge",
    "llm_judge_aime25": "llm_judge",
    "code": "code",
    "reward_model": "reward_model_judge",
    "genrm": "genrm_verifier",
}

_GRPO = "nemo_aligner.experimental.grpo"
_ENVIRONMENTS = f"{_GRPO}.experience.environments"
_SCRIPT = "nemo_aligner.utils.train_script_utils"
# What the steps below use of the host, beside what our actor and trainer do.
NEEDED = (
    Needed("nemo.utils.exp_manager", "exp_manager"),
    *(
        Needed(_SCRIPT, name)
        for name in (
            "CustomLoggerWrapper",
            "add_custom_checkpoint_callback",
            "extract_optimizer_scheduler_from_ptl_model",
            "init_distributed",
            "init_peft",
            "init_using_ptl",
            "resolve_and_create_trainer",
            "retrieve_custom_trainer_state_dict",
        )
    ),
    Needed("nemo_aligner.utils.utils", "load_and_override_model_config"),
    Needed("nemo_aligner.utils.utils", "load_from_nemo", ("strict", "restore_path")),
    Needed("nemo_aligner.utils.utils", "retrieve_model_state_dict_in_cpu", ("megatron_amp_O2",)),
    Needed("nemo_aligner.utils.batch_iterators", "get_batch_iterator_cls"),
    Needed("nemo_aligner.utils.distributed", "Timer"),
    Needed(f"{_GRPO}.data.datasets", "AllTaskDataset.__init__", ("seq_length",)),
    Needed(
        f"{_GRPO}.data.builders",
        "build_dataloader",
        ("consumed_samples", "mbs", "gbs", "load_gbs", "use_random_sampler"),
    ),
    Needed(f"{_GRPO}.data.builders", "environment_collate_with_pad_to_max_batch"),
    Needed(f"{_GRPO}.experience.rollout_generator", "SequenceRewardRolloutGenerator"),
    Needed(f"{_ENVIRONMENTS}.math_environment", "MathEnvironment"),
    Needed(f"{_ENVIRONMENTS}.code_environment", "CodeEnvironment"),
    Needed(f"{_ENVIRONMENTS}.llm_judge_environment", "LLMJudgeEnvironment"),
    Needed(f"{_ENVIRONMENTS}.reward_model_environment", "RewardModelEnvironment"),
    Needed(f"{_ENVIRONMENTS}.genrm_environment", "GenRMEnvironment"),
)

Environments = Mapping[str, Any]


def launch() -> None:
    """The command line."""
    register_resolvers()
    try:
        from nemo.core.config import hydra_runner
    except ImportError as error:
        _leave(f"NeMo cannot be imported ({error}); tested with {interface_guard.TESTED.versions}")
    config_name = SHIPPED.removesuffix(".yaml")
    hydra_runner(config_path=str(conf_dir() / "aligner"), config_name=config_name)(main)()


def main(cfg: DictConfig) -> None:
    """Check, then train; a mistake of the user ends the process with status 2."""
    try:
        check(cfg)
        check_host_is_known()
        run(cfg)
    except (ConfigError, InterfaceMismatch) as error:
        _leave(str(error))


def register_resolvers() -> None:
    """The functions that the configuration's own values may call."""
    for name, function in {
        "multiply": lambda x, y: x * y,
        "int_div": lambda x, y: x // y,
        "subtract": lambda x, y: x - y,
    }.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def check(cfg: DictConfig) -> ApoSettings:
    """All rules that need nothing but the configuration; the settings of ``model.apo``.

    Raises:
        ConfigError: naming key, value and rule.
    """
    try:
        apo = read_settings(cfg.model.get("apo"))
        host_rules.check_known(cfg)
        host_rules.check_host(cfg, apo)
        host_rules.check_inputs(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{key}: {first_line(error)}") from None
    return apo


def check_host_is_known() -> None:
    """Raise ``InterfaceMismatch`` unless all of the host that a run uses is there."""
    import nemo_apo.aligner.grpo
    import nemo_apo.aligner.grpo_trainer  # noqa: F401

    interface_guard.check(NEEDED)


def run(
    cfg: DictConfig,
    actor_class: type | None = None,
    make_environments: Callable[[DictConfig], Environments] | None = None,
) -> Any:
    """Train as a checked configuration says; returns the trainer.

    Args:
        cfg: ``trainer``, ``model``, ``exp_manager`` and ``pretrained_checkpoint``; values of the
            checkpoint's own configuration are added to ``model``.
        actor_class: a class derived from ``ApoGRPOActor``, to be trained in its place.
        make_environments: from ``trainer.grpo.environments`` to graders by task name, in place of
            ``environments``.
    """
    # Workers forked from a process that uses CUDA cannot use it.
    torch.multiprocessing.set_start_method("spawn", force=True)
    complete(cfg)
    lightning, logger = _lightning(cfg)
    actor = _actor(cfg, lightning, actor_class)
    counters = _saved_counters(lightning)
    _start_ranks(cfg, lightning, actor)
    graders = (make_environments or environments)(cfg.trainer.grpo.environments)
    datasets = {split: _dataset(cfg, split, actor, graders) for split in ("train", "validation")}
    _set_up_training(cfg, lightning, actor, datasets["train"])
    logger.log_hyperparams(OmegaConf.to_container(cfg))
    trainer = _trainer(cfg, lightning, logger, actor, datasets, graders)
    if counters is not None:
        trainer.load_state_dict(counters)
    trainer.fit()
    return trainer


def complete(cfg: DictConfig) -> None:
    """Add what the checkpoint's own configuration says of the model, and check once more."""
    from nemo_aligner.utils.utils import load_and_override_model_config

    path = cfg.pretrained_checkpoint.restore_from_path
    cfg.model = load_and_override_model_config(path, cfg.model)
    check(cfg)


def environments(cfg: DictConfig) -> dict[str, Any]:
    """The graders by task name, each a client of its own of the servers that ``cfg`` names."""
    from nemo_aligner.experimental.grpo.experience.environments.code_environment import (
        CodeEnvironment,
    )
    from nemo_aligner.experimental.grpo.experience.environments.genrm_environment import (
        GenRMEnvironment,
    )
    from nemo_aligner.experimental.grpo.experience.environments.llm_judge_environment import (
        LLMJudgeEnvironment,
    )
    from nemo_aligner.experimental.grpo.experience.environments.math_environment import (
        MathEnvironment,
    )
    from nemo_aligner.experimental.grpo.experience.environments.reward_model_environment import (
        RewardModelEnvironment,
    )

    classes = {
        "math": MathEnvironment,
        "code": CodeEnvironment,
        "llm_judge": LLMJudgeEnvironment,
        "reward_model_judge": RewardModelEnvironment,
        "genrm_verifier": GenRMEnvironment,
    }
    return {task: classes[name](cfg[name]) for task, name in ENVIRONMENT_OF_TASK.items()}


def check_tasks(split: str, tasks: set[str], graders: Environments) -> None:
    """Every prompt must have a grader: the host would leave one without out, unseen."""
    lost = sorted(tasks - graders.keys())
    rule = f"holds prompts of tasks that no environment grades; there are {', '.join(graders)}"
    require(not lost, f"model.data.data_prefix.{split}: task_name", ", ".join(lost), rule)


def _lightning(cfg: DictConfig) -> tuple[Any, Any]:
    """Lightning's trainer, which carries the model and finds checkpoints, and its loggers."""
    from nemo.utils import logging
    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.utils.train_script_utils import (
        CustomLoggerWrapper,
        resolve_and_create_trainer,
    )

    logging.info(f"configuration:\n{OmegaConf.to_yaml(cfg)}")
    lightning = resolve_and_create_trainer(cfg, "grpo")
    exp_manager(lightning, cfg.exp_manager)
    return lightning, CustomLoggerWrapper(lightning.loggers)


def _actor(cfg: DictConfig, lightning: Any, actor_class: type | None) -> Any:
    """The policy, and the reference that it is compared with: a copy of its first weights."""
    from nemo_aligner.utils.train_script_utils import init_peft
    from nemo_aligner.utils.utils import load_from_nemo, retrieve_model_state_dict_in_cpu

    from nemo_apo.aligner.grpo import ApoGRPOActor

    path = cfg.pretrained_checkpoint.restore_from_path
    actor = load_from_nemo(
        actor_class or ApoGRPOActor, cfg.model, lightning, strict=True, restore_path=path
    )
    init_peft(actor, cfg.model)
    # Whatever the objective: the host asks for the reference's log-probs of every rollout.
    actor.init_policy_state_dict = retrieve_model_state_dict_in_cpu(
        actor, megatron_amp_O2=cfg.model.get("megatron_amp_O2", False)
    )
    return actor


def _saved_counters(lightning: Any) -> dict[str, Any] | None:
    """The trainer's counters from the checkpoint to resume; None for a new run.

    To be read before training is set up, after which Lightning has forgotten the checkpoint.
    """
    from nemo_aligner.utils.train_script_utils import retrieve_custom_trainer_state_dict

    if lightning.ckpt_path is None:
        return None
    return retrieve_custom_trainer_state_dict(lightning)


def _start_ranks(cfg: DictConfig, lightning: Any, actor: Any) -> None:
    """Process groups, and the folder of sampled texts, which the host expects to exist."""
    from nemo_aligner.utils.train_script_utils import init_distributed

    init_distributed(lightning, actor, cfg.model.get("transformer_engine", False))
    os.makedirs(cfg.trainer.grpo.generation_save_dir, exist_ok=True)


def _dataset(cfg: DictConfig, split: str, actor: Any, graders: Environments) -> Any:
    """The prompts of a split."""
    from nemo_aligner.experimental.grpo.data.datasets import AllTaskDataset

    data = cfg.model.data
    dataset = AllTaskDataset(
        data.data_prefix[split][0],
        actor.tokenizer,
        data.apply_chat_template,
        data.system_prompt_file,
        data.prompt_file,
        seq_length=data.seq_length,
    )
    check_tasks(split, {line["task_name"] for line in dataset.data}, graders)
    return dataset


def _set_up_training(cfg: DictConfig, lightning: Any, actor: Any, dataset: Any) -> None:
    """Optimizer and learning rate, and the weights and states of a checkpoint to resume."""
    from nemo_aligner.utils.train_script_utils import init_using_ptl

    steps = host_rules.optimizer_steps(cfg, len(dataset))
    # What NeMo's learning-rate schedule takes for the whole run: by itself it would count RL steps,
    # and batches of a size that depends on the number of ranks.
    lightning.fit_loop.epoch_loop.max_steps = steps
    # Never read: NeMo only wants a loader to be there.
    init_using_ptl(lightning, actor, torch.utils.data.DataLoader(dataset), dataset)
    del actor._train_dl


def _trainer(
    cfg: DictConfig,
    lightning: Any,
    logger: Any,
    actor: Any,
    datasets: Mapping[str, Any],
    graders: Environments,
) -> Any:
    """The GRPO trainer with all that it calls."""
    from nemo_aligner.experimental.grpo.data.builders import (
        environment_collate_with_pad_to_max_batch,
    )
    from nemo_aligner.experimental.grpo.experience.rollout_generator import (
        SequenceRewardRolloutGenerator,
    )
    from nemo_aligner.utils.batch_iterators import get_batch_iterator_cls
    from nemo_aligner.utils.distributed import Timer
    from nemo_aligner.utils.train_script_utils import (
        add_custom_checkpoint_callback,
        extract_optimizer_scheduler_from_ptl_model,
    )

    from nemo_apo.aligner.grpo_trainer import ApoGRPOTrainer

    grpo = cfg.trainer.grpo
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(actor)
    collate = environment_collate_with_pad_to_max_batch(
        cfg.model.grpo.length_params.max_length,
        actor.tokenizer.eos_id,
        cfg,
        generate_masks_and_position_ids=False,
    )
    prompts = partial(_prompts, cfg, collate, datasets)
    return ApoGRPOTrainer(
        cfg=grpo,
        model=actor,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader_builder=prompts("train"),
        val_dataloader_builder=prompts("validation"),
        collate_fn=collate,
        rollout_generator=SequenceRewardRolloutGenerator(grpo, graders),
        batch_iterator_cls=get_batch_iterator_cls(grpo.get("batch_iterator", {})),
        logger=logger,
        ckpt_callback=add_custom_checkpoint_callback(lightning, actor),
        run_timer=Timer(cfg.exp_manager.get("max_time_per_run") if cfg.exp_manager else None),
    )


def _prompts(
    cfg: DictConfig, collate: Callable[..., Any], datasets: Mapping[str, Any], split: str
) -> Callable[..., Any]:
    """The builder of a split's data loader, for any number of consumed prompts."""
    from nemo_aligner.experimental.grpo.data.builders import build_dataloader

    grpo, training = cfg.trainer.grpo, split == "train"
    prefix = "" if training else "val_"
    return partial(
        build_dataloader,
        cfg=cfg,
        dataset=datasets[split],
        mbs=grpo[f"{prefix}prompt_micro_batch_size"],
        gbs=grpo[f"{prefix}num_prompts_per_grpo_step"],
        collate_fn=collate,
        load_gbs=False,
        use_random_sampler=training and cfg.model.data.shuffle_train_data,
    )


def _leave(message: str) -> NoReturn:
    """End with status 2; the first rank says why."""
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    if rank == "0":
        print(f"nemo-apo: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


if __name__ == "__main__":
    launch()
