"""What is relied on of NeMo-Aligner."""

from nemo_apo.plugin import interface_guard
from nemo_apo.plugin.interface_guard import Needed, Tested

TESTED = Tested(
    plugin="nemo_apo.aligner",
    versions=(
        "NeMo-Aligner branch llama-nemotron-dev (commit 8c31926) and release 0.7.0, "
        "with nemo_toolkit 2.1.0 and megatron-core 0.10.0"
    ),
    packages=("nemo-aligner", "nemo_toolkit", "megatron-core"),
)

_BRANCH = "nemo_aligner.experimental.grpo"
_BRANCH_ACTOR = f"{_BRANCH}.models.nlp.gpt.megatron_gpt_grpo_actor"
_BRANCH_TRAINER = f"{_BRANCH}.algorithms.grpo"
_PPO = "nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor"
_REINFORCE = "nemo_aligner.models.nlp.gpt.megatron_gpt_reinforce_actor"


def _actor(module: str, name: str) -> tuple[Needed, ...]:
    """What the mixin overrides or calls of an actor class."""
    return (
        Needed(module, f"{name}.__init__", ("cfg", "trainer")),
        Needed(module, f"{name}.get_actor_forward_output_and_loss_func"),
        Needed(module, f"{name}.get_loss_and_metrics", ("batch", "forward_only")),
        Needed(module, f"{name}.get_logprob_output_only_func", ("inference_only",)),
        Needed(
            module,
            f"{name}.get_inference_log_probs",
            ("response_tokens", "forward_micro_batch_size"),
        ),
        Needed(module, f"{name}.get_init_policy_logprobs", ("response_tokens",)),
        Needed(module, f"{name}.prepare_for_training"),
        Needed(module, f"{name}.prepare_for_training_step"),
        Needed(module, f"{name}.finish_training_step"),
        Needed(module, f"{name}.finish_training"),
        Needed(module, f"{name}.on_save_checkpoint", ("checkpoint",)),
        Needed(module, f"{name}.on_load_checkpoint", ("checkpoint",)),
    )


GRPO = (
    *_actor(_BRANCH_ACTOR, "MegatronGPTActorModel"),
    Needed(_BRANCH_ACTOR, "allgather_cp_sharded_tensor", ("tensor", "seq_dim")),
    Needed(_BRANCH_TRAINER, "GRPOTrainer.__init__", ("cfg", "model", "batch_iterator_cls")),
    Needed(
        _BRANCH_TRAINER,
        "GRPOTrainer.create_grpo_training_data_from_inferences",
        ("rollout_batch",),
    ),
    Needed(_BRANCH_TRAINER, "GRPOTrainer.run_training", ("dataloader_iter",)),
    Needed(_BRANCH_TRAINER, "GRPOTrainer.load_state_dict", ("state_dict",)),
    Needed("nemo_aligner.utils.batch_iterators", "GRPOBatchIterator", ("dataset", "collate_fn")),
    Needed("nemo_aligner.utils.train_utils", "clip_gradients", ("ptl_model", "clip_val")),
    Needed("nemo_aligner.utils.train_utils", "set_eval", ("ptl_model",)),
    Needed(
        "nemo_aligner.utils.ppo_utils",
        "create_mask",
        ("values", "prompt_lengths", "response_lengths"),
    ),
)
RELEASED = (
    *_actor(_PPO, "MegatronGPTActorModel"),
    *_actor(_REINFORCE, "MegatronGPTReinforceActorModel"),
)


def check(needed: tuple[Needed, ...]) -> None:
    """Import and inspect what is needed.

    Raises:
        InterfaceMismatch: naming what is missing, what is installed and what was tested.
    """
    interface_guard.check(needed, TESTED)
