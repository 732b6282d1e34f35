"""Rules between the block ``apo`` and NeMo-RL's own keys, checked before Ray starts.

The host's loss is replaced, and from its advantages rewards are read back: a key of theirs that
would change what is trained, or that nothing would read, is refused instead of ignored. Rules are
over the plain container of the configuration, whatever classes a version makes of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_apo.compose.schema import assigned, shown, suggestion
from nemo_apo.config import ConfigError, require
from nemo_apo.core.alpha_schedule import GuardedSchedule
from nemo_apo.core.objectives.anchored import uses_stale_logprobs
from nemo_apo.core.temperature import AdaptiveTemperature
from nemo_apo.plugin.settings import ApoSettings

GROUP_SIZE = "grpo.num_generations_per_prompt"
PROMPTS = "grpo.num_prompts_per_step"
BATCH_SIZE = "policy.train_global_batch_size"
# The rest of what the run is measured by.
STEPS, EPOCHS = "grpo.max_num_steps", "grpo.max_num_epochs"
RESPONSE_LENGTH = "policy.generation.max_new_tokens"
REFERENCE = "loss_fn.reference_policy_kl_penalty"

# The switch of the Megatron workers' log-probs without logits.
FUSED = "policy.megatron_cfg.use_fused_linear_logprobs"
TEMPERATURE, PACKING = "policy.generation.temperature", "policy.sequence_packing.enabled"
DYNAMIC_SAMPLING = "grpo.use_dynamic_sampling"
# For a key that is not written.
_NOWHERE = object()

# The host's loss with its default values, and where its keys are said instead ("" is nowhere).
# Nothing reads them: the values of the host's examples may stay, others would be ignored.
REPLACED: Mapping[str, tuple[Any, str]] = {
    "disable_ppo_ratio": (False, "apo.objective.name"),
    "token_level_loss": (True, "apo.objective.aggregation"),
    "sequence_level_importance_ratios": (False, "apo.objective.name=gspo"),
    "use_cispo": (False, "apo.objective.name=cispo"),
    "ratio_clip_min": (0.2, "apo.objective.clip_low"),
    "ratio_clip_max": (0.2, "apo.objective.clip_high"),
    "ratio_clip_c": (None, ""),
    "positive_example_nll_weight": (0.0, ""),
    "reference_policy_kl_type": ("k3", "apo.regularizers.kl_estimator"),
    "use_kl_in_reward": (False, "apo.regularizers.kl_estimator=k1"),
    "kl_input_clamp_value": (20.0, ""),
    "kl_output_clamp_value": (10.0, ""),
    "use_on_policy_kl_approximation": (False, ""),
    "use_importance_sampling_correction": (False, ""),
    "truncated_importance_sampling_type": (None, ""),
    "truncated_importance_sampling_ratio": (None, ""),
    "truncated_importance_sampling_ratio_min": (None, ""),
}


@dataclass(frozen=True)
class Rule:
    """What a key may hold.

    Attributes:
        allowed: the values.
        absent: what the host takes where the key is missing.
        reason: why no other.
    """

    key: str
    allowed: tuple[Any, ...]
    absent: Any
    reason: str


_BY_APO = "rewards are weighed by apo.objective.advantages, from advantages that are r - mean"
_CHANGES = "changes advantages after the fact, and rewards are read back from them"
_PLAIN = "the log-probs that are trained must be those of the policy itself"
_OTHER_LOSS = "adds a loss of its own beside the objective"
RULES = (
    Rule(
        "grpo.use_leave_one_out_baseline",
        (False,),
        True,
        "advantages and this baseline must add up to the rewards; with grpo.use_dynamic_sampling "
        "it would also drop the lone winner of a group, row by row",
    ),
    Rule("grpo.adv_estimator.name", ("grpo",), "grpo", _BY_APO),
    Rule(
        "grpo.adv_estimator.normalize_rewards",
        (False,),
        True,
        f"{_BY_APO}; set grpo.normalize_rewards=false, which this key follows in the examples",
    ),
    Rule(
        "grpo.adv_estimator.use_leave_one_out_baseline",
        (False,),
        True,
        f"{_BY_APO}; set grpo.use_leave_one_out_baseline=false, which this key follows in the "
        "examples",
    ),
    Rule("grpo.advantage_clip_low", (None,), None, _CHANGES),
    Rule("grpo.advantage_clip_high", (None,), None, _CHANGES),
    Rule("grpo.invalid_tool_call_advantage", (None,), None, _CHANGES),
    Rule("grpo.malformed_thinking_advantage", (None,), None, _CHANGES),
    Rule(
        "loss_fn.force_on_policy_ratio",
        (False,),
        False,
        "the host would then hand over zeros for the log-probs of the policy that sampled",
    ),
    Rule("grpo.async_grpo.enabled", (False,), False, "only synchronous GRPO calls this policy"),
    Rule("data_plane.enabled", (False,), False, "takes a policy class of its own"),
    Rule("on_policy_distillation.enabled", (False,), False, "replaces rewards by a teacher's"),
    Rule("policy.draft.enabled", (False,), False, _OTHER_LOSS),
    Rule("policy.megatron_cfg.mtp_num_layers", (0, None), 0, _OTHER_LOSS),
    Rule(
        "grpo.calculate_advantages_on_gpu",
        (False,),
        False,
        "group means from two devices differ in their last bits, and equal rewards would not stay "
        "equal",
    ),
    Rule(
        "policy.megatron_cfg.use_linear_ce_fusion_loss",
        (False,),
        False,
        "0.7.0 has this for other trainers than GRPO, and main under another name "
        "(use_fused_linear_logprobs)",
    ),
    Rule(TEMPERATURE, (1.0,), 1.0, _PLAIN),
    Rule("policy.generation.top_p", (1.0, None), 1.0, _PLAIN),
    Rule("policy.generation.top_k", (None, -1, 0), None, _PLAIN),
)


def check(config: Mapping[str, Any], settings: ApoSettings) -> None:
    """Check a whole, resolved configuration of NeMo-RL against the settings of ``apo``.

    Raises:
        ConfigError: naming key, value and rule.
    """
    _check_sections(config)
    _check_fused(config)
    for rule in RULES:
        _check_rule(config, rule)
    _check_loss(config["loss_fn"])
    _check_reference(config, settings)
    _check_sizes(config)
    _check_settings(settings)
    if value_of(config, DYNAMIC_SAMPLING, False):
        _check_selected(settings)


def _check_selected(settings: ApoSettings) -> None:
    """With dynamic sampling only groups of unequal rewards are seen, chosen for their spread."""
    because = f"with {DYNAMIC_SAMPLING}: "
    rule = because + "must be ess, linear, cosine or fixed; the mean reward of groups that were "
    rule += "chosen for their spread hides the improvement that this schedule waits for"
    guarded = settings.objective.uses_alpha and isinstance(settings.schedule, GuardedSchedule)
    require(not guarded, "apo.schedule.name", "guarded", rule)
    rule = because + "must not be raw; a prompt that comes twice shifts the rewards of its groups"
    advantages = settings.objective.advantages
    require(advantages != "raw", "apo.objective.advantages", advantages, rule)
    rule = because + "must be fixed; it would look at the rewards of groups chosen for their spread"
    adapts = settings.objective.uses_anchor and isinstance(settings.tau, AdaptiveTemperature)
    require(not adapts, "apo.tau.name", "adaptive", rule)


def _check_settings(settings: ApoSettings) -> None:
    """What the host's workers do not tell cannot be asked for."""
    entropy_coef = settings.regularizers.entropy_coef
    rule = "must be 0: the host hands its losses no entropy"
    require(entropy_coef == 0.0, "apo.regularizers.entropy_coef", shown(entropy_coef), rule)
    rule = "must be forward: workers do not tell the sequence log-probs that an update has seen"
    stale = uses_stale_logprobs(settings.objective)
    require(not stale, "apo.objective.refresh", "stale", rule)
    rule = f"must be old: {settings.objective.name} has no anchor, so nothing would read it"
    unread = settings.anchor.name != "old" and not settings.objective.uses_anchor
    require(not unread, "apo.anchor.name", settings.anchor.name, rule)


def has_fused_linear_logprobs(config: Mapping[str, Any]) -> bool:
    """Whether the workers hand the loss log-probs that never were logits."""
    enabled = value_of(config, "policy.megatron_cfg.enabled", False)
    return bool(enabled and value_of(config, FUSED, False))


def value_of(config: Mapping[str, Any], key: str, absent: Any = None) -> Any:
    """The value of a dotted key; ``absent`` where it, or a section above it, is not there."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return absent
        found = found[part]
    return found


def _check_sections(config: Mapping[str, Any]) -> None:
    for section in ("grpo", "loss_fn", "policy"):
        if not isinstance(config.get(section), Mapping):
            raise ConfigError(
                f"{assigned(section, config.get(section))}: is missing; start from one of "
                "NeMo-RL's examples, or from a recipe in nemo_apo's conf/nemo_rl"
            )


def _check_fused(config: Mapping[str, Any]) -> None:
    """What the path without logits cannot do; the host's own checks come after Ray has started."""
    if not has_fused_linear_logprobs(config):
        return
    temperature, packed = value_of(config, TEMPERATURE, 1.0), value_of(config, PACKING, False)
    rule = f"must be 1.0 with {FUSED.rpartition('.')[2]}: that path divides log-probs by it, "
    rule += "not logits"
    require(temperature == 1.0, TEMPERATURE, shown(temperature), rule)
    rule = "must be false with fused linear log-probs: that path would mix the sequences of a pack"
    require(not packed, PACKING, shown(packed), rule)


def _check_rule(config: Mapping[str, Any], rule: Rule) -> None:
    written = value_of(config, rule.key, _NOWHERE)
    value = rule.absent if written is _NOWHERE else written
    choices = " or ".join(shown(choice) for choice in rule.allowed)
    # Not by ``in`` alone, for which 1 and true are the same.
    fits = any(value == choice and _kind(value) == _kind(choice) for choice in rule.allowed)
    text = f"must be {choices}: {rule.reason}"
    if written is _NOWHERE:
        text = f"is what a version of the host takes where nothing is written; {text}"
    require(fits, rule.key, shown(value), text)


def _check_loss(loss: Mapping[str, Any]) -> None:
    """No key of the host's loss says anything that is not read."""
    known = {*REPLACED, REFERENCE.split(".")[1], "force_on_policy_ratio"}
    for name, value in loss.items():
        key = f"loss_fn.{name}"
        if name not in known:
            near = suggestion(key, [f"loss_fn.{one}" for one in known])
            raise ConfigError(f"{assigned(key, value)}: there is no such key{near}")
        if name in REPLACED:
            default, instead = REPLACED[name]
            rule = f"is not read by this loss; leave it {shown(default)}"
            rule += f" and set {instead}" if instead else ""
            require(value == default, key, shown(value), rule)


def _check_reference(config: Mapping[str, Any], settings: ApoSettings) -> None:
    """The host keeps the policy at the start only where its own penalty is above zero."""
    penalty, kl_coef = value_of(config, REFERENCE, 0.01), settings.regularizers.kl_coef
    if kl_coef > 0.0:
        rule = f"must be apo.regularizers.kl_coef={kl_coef}, the weight that is trained with"
        require(penalty == kl_coef, REFERENCE, shown(penalty), rule)
    elif settings.anchor.name == "reference":
        rule = "must be above 0 with apo.anchor.name=reference: only then does the host load the "
        rule += "policy at the start (nothing else reads this value)"
        require(_is_number(penalty) and penalty > 0.0, REFERENCE, shown(penalty), rule)
    else:
        rule = "must be 0 with apo.regularizers.kl_coef=0: this loss does not read it, and the "
        rule += "host would load a reference that nothing compares with"
        require(penalty == 0.0, REFERENCE, shown(penalty), rule)
        return
    key = "grpo.skip_reference_policy_logprobs_calculation"
    skips = value_of(config, key, False)
    rule = "must be false: apo.anchor or apo.regularizers reads the log-probs of the reference"
    require(not skips, key, shown(skips), rule)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Every optimizer step holds whole groups, and together they hold the rollout."""
    for key in (GROUP_SIZE, PROMPTS, BATCH_SIZE, STEPS, EPOCHS, RESPONSE_LENGTH):
        value = value_of(config, key)
        fits = type(value) is int and value >= 1
        rule = "must be a whole number of at least 1"
        rule += ", written out" if value is None else ""
        require(fits, key, shown(value), rule)
    size, batch_size = value_of(config, GROUP_SIZE), value_of(config, BATCH_SIZE)
    rollout = value_of(config, PROMPTS) * size
    require(size >= 2, GROUP_SIZE, size, "a group needs at least 2")
    rule = f"must be a multiple of {GROUP_SIZE}={size}: an optimizer step holds whole groups"
    require(batch_size % size == 0, BATCH_SIZE, batch_size, rule)
    rule = f"must divide the rollout, {PROMPTS} x {GROUP_SIZE}={rollout}, of which the host would "
    rule += "leave the rest out"
    require(rollout % batch_size == 0, BATCH_SIZE, batch_size, rule)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """Values of one kind may be compared: a whole number stands for the float that it equals."""
    return "number" if _is_number(value) else type(value).__name__
