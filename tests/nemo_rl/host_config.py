"""Configurations for small runs: the host's own example, through its own loader and rules."""

from typing import Any

from tests.nemo_rl import host_source

EXAMPLE = "examples/configs/grpo_math_1B.yaml"
WORKERS = 2
GROUP_SIZE = 4
MAX_NEW_TOKENS = 6
LR = 0.01

# What the example asks of GPUs, and what APO asks of the example.
_CHANGES = f"""
policy.precision=float32
policy.max_total_sequence_length=64
policy.train_global_batch_size=8
policy.train_micro_batch_size=2
policy.logprob_batch_size=2
policy.make_sequence_length_divisible_by=1
policy.max_grad_norm=null
policy.optimizer.name=torch.optim.SGD
~policy.optimizer.kwargs
+policy.optimizer.kwargs.lr={LR}
+policy.optimizer.kwargs.foreach=false
~policy.scheduler
policy.sequence_packing.enabled=false
policy.dynamic_batching.enabled=false
policy.generation.max_new_tokens={MAX_NEW_TOKENS}
cluster.gpus_per_node={WORKERS}
cluster.num_nodes=1
loss_fn.reference_policy_kl_penalty=0.0
grpo.num_generations_per_prompt={GROUP_SIZE}
grpo.normalize_rewards=false
grpo.use_leave_one_out_baseline=false
""".split()

DYNAMIC_BATCHING = (
    "policy.dynamic_batching.enabled=true",
    "policy.dynamic_batching.train_mb_tokens=32",
    "policy.dynamic_batching.logprob_mb_tokens=32",
    "policy.dynamic_batching.sequence_length_round=4",
)


# Sequences of at most 16 tokens: two or more in a pack, and packs of different numbers.
SEQUENCE_PACKING = (
    "policy.sequence_packing.enabled=true",
    "policy.sequence_packing.train_mb_tokens=40",
    "policy.sequence_packing.logprob_mb_tokens=40",
    "policy.sequence_packing.sequence_length_round=4",
)


def backend(version: int) -> list[str]:
    """The overrides that choose the first or the second kind of DTensor worker."""
    if version == 1:
        return ["policy.dtensor_cfg._v2=false"]
    variable = f"policy.dtensor_cfg.env_vars.{host_source.AUTOMODEL_VARIABLE}"
    return ["policy.dtensor_cfg._v2=true", f"++{variable}='1'"]


def changes(model: str) -> list[str]:
    """The overrides of every run of a model folder."""
    return [f"policy.model_name={model}", *_CHANGES]


def composed(model: str, *overrides: str) -> dict[str, Any]:
    """The example's keys and values for a model folder, with overrides as on a command line."""
    from nemo_rl.utils.config import (
        load_config,
        parse_hydra_overrides,
        register_omegaconf_resolvers,
    )
    from omegaconf import OmegaConf

    register_omegaconf_resolvers()
    example = load_config(str(host_source.checkout() / EXAMPLE))
    changed = parse_hydra_overrides(example, [*changes(model), *overrides])
    container = OmegaConf.to_container(changed, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def master_config(model: str, *overrides: str) -> Any:
    """The same as the host's ``MasterConfig``, ready for its ``setup``."""
    from nemo_rl.algorithms.grpo import MasterConfig
    from nemo_rl.models.generation import configure_generation_config

    from tests.nemo_rl.tiny_model import load_tokenizer

    config = MasterConfig(**composed(model, *overrides))
    config.policy["generation"] = configure_generation_config(
        config.policy["generation"], load_tokenizer(model)
    )
    return config
