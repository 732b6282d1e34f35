"""What is refused of a NeMo-RL configuration, each rule broken alone."""

import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_apo.config import ConfigError
from nemo_apo.core.objectives import OBJECTIVES
from nemo_apo.nemo_rl import host_rules
from nemo_apo.nemo_rl.settings import read_settings
from tests.nemo_rl.example_config import NEEDED, example


def resolved(**changes: Any) -> dict[str, Any]:
    """The example with some keys changed."""
    config = OmegaConf.create(example())
    for key, value in changes.items():
        OmegaConf.update(config, key, value, force_add=True)
    return OmegaConf.to_container(config, resolve=True)


def check(apo: dict[str, Any] | None = None, **changes: Any) -> None:
    """Check the example with what APO needs, some keys changed."""
    host_rules.check(resolved(**{**NEEDED, **changes}), read_settings(apo))


def refusal(apo: dict[str, Any] | None = None, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(apo, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_example_with_what_apo_needs_passes() -> None:
    check()


@pytest.mark.parametrize("key", NEEDED)
def test_the_example_lacks_each_of_what_apo_needs(key: str) -> None:
    kept = OmegaConf.select(OmegaConf.create(example()), key)
    assert refusal(**{key: kept})


GRPO, LOSS, POLICY = "grpo.", "loss_fn.", "policy."
ESTIMATOR, GENERATION = f"{GRPO}adv_estimator.", f"{POLICY}generation."
BROKEN: list[tuple[str, Any, str]] = [
    # advantages
    (GRPO + "normalize_rewards", True, "grpo.adv_estimator.normalize_rewards=true: must be false"),
    (ESTIMATOR + "normalize_rewards", True, "normalize_rewards=true: must be false: rewards are"),
    (ESTIMATOR + "use_leave_one_out_baseline", True, "baseline=true: must be false: rewards are"),
    (GRPO + "use_leave_one_out_baseline", True, "use_leave_one_out_baseline=true: must be false"),
    (ESTIMATOR + "name", "gdpo", "adv_estimator.name=gdpo: must be grpo"),
    (ESTIMATOR + "name", "reinforce_plus_plus", "name=reinforce_plus_plus: must be grpo"),
    (GRPO + "advantage_clip_low", -5.0, "advantage_clip_low=-5.0: must be null: changes adv"),
    (GRPO + "advantage_clip_high", 5.0, "advantage_clip_high=5.0: must be null: changes adv"),
    (GRPO + "invalid_tool_call_advantage", -5.0, "invalid_tool_call_advantage=-5.0: must be null"),
    (GRPO + "malformed_thinking_advantage", 0.0, "malformed_thinking_advantage=0.0: must be null"),
    (GRPO + "calculate_advantages_on_gpu", True, "on_gpu=true: must be false: group means from"),
    # the host's loss
    (LOSS + "reference_policy_kl_penalty", 0.01, "penalty=0.01: must be 0 with apo.regularizers"),
    (LOSS + "reference_policy_kl_type", "k1", "type=k1: is not read .* apo.regularizers.kl_est"),
    (LOSS + "kl_input_clamp_value", None, "kl_input_clamp_value=null: is not read .* it 20.0$"),
    (LOSS + "kl_output_clamp_value", 5.0, "kl_output_clamp_value=5.0: is not read"),
    (LOSS + "ratio_clip_min", 0.1, "ratio_clip_min=0.1: is not .* set apo.objective.clip_low"),
    (LOSS + "ratio_clip_max", 0.28, "ratio_clip_max=0.28: is not .* set apo.objective.clip_high"),
    (LOSS + "ratio_clip_c", 3.0, "ratio_clip_c=3.0: is not read by this loss; leave it null$"),
    (LOSS + "use_on_policy_kl_approximation", True, "approximation=true: is not read"),
    (LOSS + "use_importance_sampling_correction", True, "correction=true: is not read"),
    (LOSS + "truncated_importance_sampling_type", "tis", "sampling_type=tis: is not read"),
    (LOSS + "truncated_importance_sampling_ratio", 2.0, "sampling_ratio=2.0: is not read"),
    (LOSS + "truncated_importance_sampling_ratio_min", 0.5, "ratio_min=0.5: is not read"),
    (LOSS + "sequence_level_importance_ratios", True, "=true: is not .* apo.objective.name=gspo"),
    (
        LOSS + "token_level_loss",
        False,
        "=false: is not .* set apo.objective.aggregation",
    ),
    (LOSS + "force_on_policy_ratio", True, "force_on_policy_ratio=true: must be false: .* zeros"),
    (LOSS + "use_kl_in_reward", True, "=true: is not .* apo.regularizers.kl_estimator=k1"),
    (LOSS + "use_cispo", True, "use_cispo=true: is not read .* set apo.objective.name=cispo"),
    (LOSS + "disable_ppo_ratio", True, "disable_ppo_ratio=true: is not read"),
    (LOSS + "positive_example_nll_weight", 0.1, "positive_example_nll_weight=0.1: is not read"),
    (LOSS + "ratio_clip_mn", 0.2, "ratio_clip_mn=0.2: there is no such key; did you mean loss_fn"),
    # other trainers, other losses
    (GRPO + "async_grpo.enabled", True, "async_grpo.enabled=true: must be false: only synchronous"),
    ("data_plane.enabled", True, "data_plane.enabled=true: must be false: takes a policy class"),
    ("on_policy_distillation", {"enabled": True}, "on_policy_distillation.enabled=true: must be"),
    (POLICY + "draft.enabled", True, "policy.draft.enabled=true: must be false: adds a loss"),
    (POLICY + "megatron_cfg.use_linear_ce_fusion_loss", True, "loss=true: must be false: 0.7.0"),
    (POLICY + "megatron_cfg.mtp_num_layers", 1, "mtp_num_layers=1: must be 0 or null: adds a"),
    # sampling
    (GENERATION + "temperature", 0.7, "generation.temperature=0.7: must be 1.0: the log-probs"),
    (GENERATION + "top_p", 0.9, "generation.top_p=0.9: must be 1.0 or null: the log-probs"),
    (GENERATION + "top_k", 50, "generation.top_k=50: must be null or -1 or 0: the log-probs"),
    # sizes
    (GRPO + "num_generations_per_prompt", 1, "num_generations_per_prompt=1: a group needs"),
    (GRPO + "num_generations_per_prompt", 24, "=512: must be a multiple of .*_per_prompt=24"),
    (POLICY + "train_global_batch_size", 320, "=320: must divide the rollout, .*=512"),
    (GRPO + "num_prompts_per_step", 0, "num_prompts_per_step=0: must be a whole number"),
    (GRPO + "num_prompts_per_step", 32.0, "num_prompts_per_step=32.0: must be a whole number"),
    (POLICY + "train_global_batch_size", None, "global_batch_size=null: must be a whole number"),
    (GRPO + "max_num_steps", None, "max_num_steps=null: must be a whole number"),
    (GRPO + "max_num_epochs", "1", "max_num_epochs=1: must be a whole number"),
    (GENERATION + "max_new_tokens", True, "max_new_tokens=true: must be a whole number"),
    # a number is no flag
    (ESTIMATOR + "normalize_rewards", 0, "normalize_rewards=0: must be false"),
    (GENERATION + "temperature", True, "temperature=true: must be 1.0"),
    # sections
    ("loss_fn", None, "loss_fn=null: is missing; start from one of NeMo-RL's examples"),
    ("grpo", 3, "grpo=3: is missing"),
]


@pytest.mark.parametrize(("key", "value", "said"), BROKEN)
def test_a_broken_rule_is_named(key: str, value: Any, said: str) -> None:
    message = refusal(**{key: value})
    assert re.search(said, message), message


def test_every_rule_is_broken_by_some_test() -> None:
    keys = {key for key, _, _ in BROKEN} | {"on_policy_distillation.enabled"}
    assert {rule.key for rule in host_rules.RULES} <= keys
    assert {f"loss_fn.{name}" for name in host_rules.REPLACED} <= keys


@pytest.mark.parametrize(
    "changes",
    [
        {GRPO + "overlong_filtering": True, GRPO + "seq_logprob_error_threshold": 2.0},
        {GRPO + "max_rollout_turns": 3},
        {POLICY + "train_global_batch_size": 128},
        {GENERATION + "top_k": -1},
        {GENERATION + "temperature": 1},
        {"on_policy_distillation": {"enabled": False}, GRPO + "async_grpo": None},
        {POLICY + "dtensor_cfg.enabled": False, POLICY + "megatron_cfg.enabled": True},
    ],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        # What the host would take for a missing key decides.
        ("grpo.adv_estimator", True),
        ("grpo.use_leave_one_out_baseline", True),
        ("loss_fn.reference_policy_kl_penalty", True),
        ("grpo.num_generations_per_prompt", True),
        ("loss_fn.ratio_clip_min", False),
        ("grpo.advantage_clip_low", False),
        ("policy.generation.temperature", False),
        ("policy.draft", False),
        ("data_plane", False),
    ],
)
def test_a_missing_key_counts_as_the_hosts_default(key: str, refused: bool) -> None:
    config = resolved(**NEEDED)
    section, _, name = key.rpartition(".")
    del (host_rules.value_of(config, section) if section else config)[name]
    if refused:
        with pytest.raises(ConfigError, match=key):
            host_rules.check(config, read_settings(None))
    else:
        host_rules.check(config, read_settings(None))


PENALTY, SKIP = host_rules.REFERENCE, "grpo.skip_reference_policy_logprobs_calculation"
KL = {"regularizers": {"kl_coef": 0.01}}
REFERENCE = {"anchor": {"name": "reference"}}


def test_a_reference_is_loaded_where_it_is_read() -> None:
    check(KL, **{PENALTY: 0.01})
    check(REFERENCE, **{PENALTY: 0.5})
    check({**KL, **REFERENCE}, **{PENALTY: 0.01})
    assert f"{PENALTY}=0: must be apo.regularizers.kl_coef=0.01" in refusal(KL)
    assert f"{PENALTY}=0.02: must be apo.regularizers" in refusal(KL, **{PENALTY: 0.02})
    assert f"{PENALTY}=0: must be above 0 with apo.anchor.name=reference" in refusal(REFERENCE)
    for apo in (KL, REFERENCE):
        assert f"{SKIP}=true: must be false" in refusal(apo, **{PENALTY: 0.01, SKIP: True})
    check(**{SKIP: True})


def test_log_probs_without_logits() -> None:
    switch = host_rules.FUSED
    fused = {switch: True, POLICY + "megatron_cfg.enabled": True}
    check(**fused)
    assert host_rules.has_fused_linear_logprobs(resolved(**fused))
    assert not host_rules.has_fused_linear_logprobs(resolved(**{switch: True}))
    message = refusal(**fused, **{GENERATION + "temperature": 0.7})
    assert message.startswith(
        "policy.generation.temperature=0.7: must be 1.0 with use_fused_linear"
    )
    assert "divides log-probs by it, not logits" in message
    message = refusal(**fused, **{POLICY + "sequence_packing.enabled": True})
    assert message.startswith("policy.sequence_packing.enabled=true: must be false with fused")


def test_leave_one_out_with_dynamic_sampling_is_told_apart() -> None:
    changes = {GRPO + "use_dynamic_sampling": True, GRPO + "use_leave_one_out_baseline": True}
    message = refusal(**changes)
    assert message.startswith("grpo.use_leave_one_out_baseline=true: must be false: ")
    assert "with grpo.use_dynamic_sampling it would also drop the lone winner" in message


def test_an_entropy_bonus_is_refused() -> None:
    message = refusal({"regularizers": {"entropy_coef": 0.1}})
    assert message == (
        "apo.regularizers.entropy_coef=0.1: must be 0: the host hands its losses no entropy"
    )


def test_an_anchor_that_nothing_reads_is_refused() -> None:
    apo = {"objective": {"name": "grpo"}, **REFERENCE}
    assert refusal(apo, **{PENALTY: 1.0}).startswith(
        "apo.anchor.name=reference: must be old: grpo has no anchor"
    )


@pytest.mark.parametrize(
    ("apo", "said"),
    [
        ({}, "apo.schedule.name=guarded: with grpo.use_dynamic_sampling: must be ess, linear"),
        ({"objective": {"name": "grpo", "advantages": "raw"}}, "advantages=raw: with grpo.use"),
        (
            {"objective": {"name": "adpo_softmax"}, "tau": {"name": "adaptive"}},
            "apo.tau.name=adaptive: with grpo.use_dynamic_sampling: must be fixed",
        ),
    ],
)
def test_what_would_look_at_rewards_of_selected_groups_is_refused(
    apo: dict[str, Any], said: str
) -> None:
    assert said in refusal(apo, **{host_rules.DYNAMIC_SAMPLING: True})
    check(apo)


@pytest.mark.parametrize("name", ["ess", "linear", "cosine", "fixed"])
def test_other_schedules_go_with_dynamic_sampling(name: str) -> None:
    check({"schedule": {"name": name}}, **{host_rules.DYNAMIC_SAMPLING: True})
    check({"objective": {"name": "gspo"}}, **{host_rules.DYNAMIC_SAMPLING: True})


def test_stale_coefficients_are_refused() -> None:
    message = refusal({"objective": {"name": "adpo_softmax", "refresh": "stale"}})
    assert message.startswith("apo.objective.refresh=stale: must be forward")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_allowed(name: str) -> None:
    check({"objective": {"name": name}})
