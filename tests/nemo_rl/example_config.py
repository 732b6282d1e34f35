"""NeMo-RL's example for GRPO on mathematics, reduced to the keys that this package reads.

With the values that the real one has; ``test_host_recipes.py`` holds it against that.
"""

from typing import Any

import yaml

EXAMPLE = """
grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 16
  max_num_epochs: 1
  max_num_steps: 1000000
  normalize_rewards: true
  use_leave_one_out_baseline: true
  advantage_clip_low: null
  advantage_clip_high: null
  use_dynamic_sampling: false
  batch_multiplier: 1
  adv_estimator:
    name: grpo
    normalize_rewards: ${grpo.normalize_rewards}
    use_leave_one_out_baseline: ${grpo.use_leave_one_out_baseline}
  invalid_tool_call_advantage: null
  malformed_thinking_advantage: null
  async_grpo:
    enabled: false
loss_fn:
  reference_policy_kl_penalty: 0.01
  reference_policy_kl_type: k3
  kl_input_clamp_value: 20.0
  kl_output_clamp_value: 10.0
  ratio_clip_min: 0.2
  ratio_clip_max: 0.2
  ratio_clip_c: null
  use_on_policy_kl_approximation: false
  use_importance_sampling_correction: false
  truncated_importance_sampling_type: null
  truncated_importance_sampling_ratio: null
  truncated_importance_sampling_ratio_min: null
  sequence_level_importance_ratios: false
  token_level_loss: true
  force_on_policy_ratio: false
  use_kl_in_reward: false
  use_cispo: false
  disable_ppo_ratio: false
  positive_example_nll_weight: 0.0
policy:
  model_name: Qwen/Qwen2.5-1.5B
  train_global_batch_size: 512
  train_micro_batch_size: 4
  max_total_sequence_length: 512
  dtensor_cfg:
    enabled: true
    _v2: true
    tensor_parallel_size: 1
    context_parallel_size: 1
  megatron_cfg:
    enabled: false
    mtp_num_layers: 0
  draft:
    enabled: false
  generation:
    backend: vllm
    max_new_tokens: ${policy.max_total_sequence_length}
    temperature: 1.0
    top_p: 1.0
    top_k: null
data:
  use_multiple_dataloader: false
checkpointing:
  enabled: true
  checkpoint_dir: results/grpo
logger:
  log_dir: logs
cluster:
  gpus_per_node: 1
  num_nodes: 1
data_plane:
  enabled: false
on_policy_distillation: null
"""
# What APO cannot do with as the example has it.
NEEDED = {
    "grpo.normalize_rewards": False,
    "grpo.use_leave_one_out_baseline": False,
    "loss_fn.reference_policy_kl_penalty": 0,
}


def example() -> dict[str, Any]:
    """The example, interpolations unresolved."""
    return yaml.safe_load(EXAMPLE)
