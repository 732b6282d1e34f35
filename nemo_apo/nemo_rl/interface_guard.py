"""What is relied on of NeMo-RL: the same names and parameters in every version that was run."""

from nemo_apo.plugin import interface_guard
from nemo_apo.plugin.interface_guard import Needed, Tested

TESTED = Tested(
    plugin="nemo_apo.nemo_rl",
    versions="NeMo-RL 0.7.0 and its main branch at commit 7ea279ab",
    packages=("nemo-rl", "ray", "torch"),
)

_GRPO = "nemo_rl.algorithms.grpo"
_LOSS = "nemo_rl.algorithms.loss.interfaces"
_POLICY = "nemo_rl.models.policy.lm_policy"
_DATA = "nemo_rl.distributed.batched_data_dict"
_CHECKPOINT = "nemo_rl.utils.checkpoint"
_CONFIG = "nemo_rl.utils.config"

CONFIGURATION = (
    Needed(_CONFIG, "merge_with_override", ("base_config", "override_config")),
    Needed(_CONFIG, "parse_hydra_overrides", ("cfg", "overrides")),
    Needed(_CONFIG, "register_omegaconf_resolvers"),
)
LOSS = (
    Needed(_LOSS, "LossType.SEQUENCE_LEVEL"),
    Needed(_LOSS, "LossInputType.LOGPROB"),
)
POLICY = (
    Needed(
        _POLICY,
        "Policy.__init__",
        ("cluster", "config", "tokenizer", "weights_path", "init_reference_model"),
    ),
    Needed(_POLICY, "Policy.train", ("data", "loss_fn", "eval_mode", "gbs", "mbs", "timer")),
    Needed(_POLICY, "Policy.get_logprobs", ("data", "timer")),
    Needed(_POLICY, "Policy.prepare_for_lp_inference"),
    Needed(_POLICY, "Policy.prepare_for_training"),
    Needed(_POLICY, "Policy.save_checkpoint", ("weights_path",)),
    Needed(_DATA, "BatchedDataDict.slice", ("start", "end")),
    Needed(_DATA, "BatchedDataDict.get_multimodal_dict", ("as_tensors",)),
)
# What the steps of ``run_grpo`` call, in their order.
SCRIPT = (
    Needed(_GRPO, "MasterConfig"),
    Needed(_CHECKPOINT, "CheckpointManager.get_latest_checkpoint_path"),
    Needed(_CHECKPOINT, "CheckpointManager.get_resume_paths", ("last_checkpoint_path",)),
    Needed("nemo_rl.utils.logger", "get_next_experiment_dir", ("base_log_dir",)),
    Needed("nemo_rl.distributed.virtual_cluster", "init_ray"),
    Needed("nemo_rl.algorithms.utils", "get_tokenizer", ("tokenizer_config",)),
    Needed(
        "nemo_rl.models.generation",
        "configure_generation_config",
        ("config", "tokenizer", "has_refit_draft_weights", "trains_mtp"),
    ),
    Needed(
        "nemo_rl.data.utils",
        "setup_response_data",
        ("tokenizer", "data_config", "env_configs"),
    ),
    Needed(
        _GRPO,
        "setup",
        ("master_config", "tokenizer", "dataset", "val_dataset", "policy_factory"),
    ),
    Needed(
        _GRPO,
        "grpo_train",
        (
            "policy",
            "policy_generation",
            "wrapped_dataloader",
            "val_dataloader",
            "tokenizer",
            "loss_fn",
            "task_to_env",
            "val_task_to_env",
            "logger",
            "checkpointer",
            "grpo_save_state",
            "master_config",
        ),
    ),
)
ALL = (*CONFIGURATION, *LOSS, *POLICY, *SCRIPT)


def check(needed: tuple[Needed, ...] = ALL) -> None:
    """Import and inspect what is needed.

    Raises:
        InterfaceMismatch: naming what is missing, what is installed and what was tested.
    """
    interface_guard.check(needed, TESTED)
