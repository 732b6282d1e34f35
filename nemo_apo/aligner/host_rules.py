"""Rules between ``model.apo`` and the host's own keys, checked before any process group starts.

The host's loss keys are replaced by ``model.apo``. Left null they say nothing; set, they must say
what the objective says, so that no value is read as meaning something that it does not do.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from nemo_apo.aligner.settings import SHIPPED
from nemo_apo.compose.files import conf_dir
from nemo_apo.compose.schema import suggestion
from nemo_apo.config import ConfigError, require
from nemo_apo.core.objectives import ClippedRatio, Objective, Regularizers
from nemo_apo.plugin.settings import ApoSettings

# Aggregations that average over the tokens of several sequences at once.
_TOKEN_MEANS = ("group_token_mean", "batch_token_mean")
_SIZES = (
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.grpo.num_prompts_per_grpo_step",
    "trainer.grpo.samples_per_prompt",
    "model.global_batch_size",
    "model.micro_batch_size",
)
# Optimizers that clip inside their step, where the host's trainer sees no gradient norm.
_CLIPS_INSIDE = ("mcore_distributed_optim", "megatron_fused_adam")
# The sampled policy must be the one whose log-probs are trained.
_PLAIN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (-1, 0),
    "top_p": (1.0,),
    "repetition_penalty": (1.0,),
    "use_greedy": (False,),
}
# Backends whose sampler is a server that is sent every weight, by the host's table of recipes.
REFITTED_BACKENDS = ("vllm", "trt_llm_pytorch")
_BACKEND = "trainer.grpo.inference_backend"
# Keys that the host reads where they are and that the shipped configuration leaves out, and a
# section whose keys are for the user to name.
_OPTIONAL = (
    "trainer.grpo.dapo.acceptable_length",
    "model.grpo.entropy_bonus",
    "trainer.grpo.environments",
)
# Reward shaping that the host folds into advantages of its own, which are not the ones used here.
_REWARD_SHAPING = ("trainer.grpo.length_penalty_enabled", "trainer.grpo.dapo.length_penalty")


def check_host(cfg: DictConfig, apo: ApoSettings) -> None:
    """Check a whole launch configuration (``trainer``, ``model``) against ``model.apo``.

    Raises:
        ConfigError: naming key, value and rule.
    """
    check_restated(cfg, apo)
    _check_sizes(cfg)
    check_groups(cfg.trainer.grpo, cfg.model)
    check_passes(cfg)
    _check_sampling(cfg.model.grpo.sampling_params)
    _check_optimizer(cfg)
    for key in _REWARD_SHAPING:
        value = OmegaConf.select(cfg, key)
        rule = "shapes rewards inside the host's own advantages; shape them in the environment"
        require(not value, key, value, rule)
    check_backend(cfg)
    check_layout(cfg)
    check_model(cfg.model)


def check_groups(grpo: DictConfig, model: DictConfig) -> None:
    """Sizes that let every optimizer step hold whole groups."""
    size, batch_size = grpo.samples_per_prompt, model.global_batch_size
    rollout = grpo.num_prompts_per_grpo_step * size
    require(size >= 2, "trainer.grpo.samples_per_prompt", size, "a group needs at least 2")
    require(
        batch_size % size == 0,
        "model.global_batch_size",
        batch_size,
        f"must be a multiple of trainer.grpo.samples_per_prompt={size}: "
        "an optimizer step holds whole groups",
    )
    require(
        rollout % batch_size == 0,
        "model.global_batch_size",
        batch_size,
        f"must divide the rollout, num_prompts_per_grpo_step x samples_per_prompt={rollout}",
    )
    for key, wanted in (("model_gbs", batch_size), ("model_mbs", model.micro_batch_size)):
        rule = f"must be the model's own, {wanted}, of which it is the trainer's copy"
        require(grpo[key] == wanted, f"trainer.grpo.{key}", grpo[key], rule)
    flask = OmegaConf.select(grpo, "batch_iterator.use_flask")
    rule = "its iterator draws each prompt once and cannot form groups; use false"
    require(not flask, "trainer.grpo.batch_iterator.use_flask", flask, rule)


def check_passes(cfg: DictConfig) -> None:
    """Batch sizes of sampling and of the log-prob pass, which the host asserts in mid-run."""
    grpo, ranks = cfg.trainer.grpo, data_parallel_size(cfg)
    for prefix in ("", "val_"):
        prompts = grpo[f"{prefix}prompt_micro_batch_size"]
        samples = grpo[f"{prefix}samples_per_prompt"]
        key, size = "trainer.grpo.generation_rollout_mbs", grpo.generation_rollout_mbs
        rule = f"must be a multiple of trainer.grpo.{prefix}prompt_micro_batch_size={prompts}"
        require(size % prompts == 0, key, size, rule)
        rule = (
            f"over {prefix}prompt_micro_batch_size must divide {prefix}samples_per_prompt={samples}"
        )
        require(samples % (size // prompts) == 0, key, size, rule)
        total = grpo[f"{prefix}num_prompts_per_grpo_step"] * samples
        rule = f"times samples, {total}, must be a multiple of the data-parallel size={ranks}"
        wrong = grpo[f"{prefix}num_prompts_per_grpo_step"]
        require(total % ranks == 0, f"trainer.grpo.{prefix}num_prompts_per_grpo_step", wrong, rule)
        size = cfg.model.grpo.forward_micro_batch_size
        rule = f"must divide the {total // ranks} sequences that a rank reads ({prefix}rollout)"
        require((total // ranks) % size == 0, "model.grpo.forward_micro_batch_size", size, rule)
    limit, length = cfg.model.grpo.length_params.max_length, cfg.model.encoder_seq_length
    rule = f"must be less than model.encoder_seq_length={length}, which holds the prompt as well"
    require(limit < length, "model.grpo.length_params.max_length", limit, rule)


def check_known(cfg: DictConfig) -> None:
    """Keys of ``trainer.grpo`` and ``model.grpo`` that nothing reads are mistakes."""
    shipped = OmegaConf.load(conf_dir() / "aligner" / SHIPPED)
    for section in ("trainer.grpo", "model.grpo"):
        known = {*_keys(OmegaConf.select(shipped, section), section), *_OPTIONAL}
        for key in _keys(OmegaConf.select(cfg, section) or {}, section):
            if not any(f"{key}.".startswith(f"{one}.") for one in known):
                raise ConfigError(f"{key}: there is no such key{suggestion(key, known)}")


def _keys(section: Mapping[str, Any] | DictConfig, prefix: str) -> Iterator[str]:
    """Dotted keys of a section, interpolations unresolved."""
    for key in section:
        inner = OmegaConf.select(section, key) if _is_section(section, key) else None
        if isinstance(inner, DictConfig) and inner:
            yield from _keys(inner, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}"


def _is_section(section: DictConfig, key: Any) -> bool:
    """Whether a key holds keys of its own; one that stands for another section counts as one."""
    return not OmegaConf.is_interpolation(section, key) and OmegaConf.is_dict(section[key])


def optimizer_steps(cfg: DictConfig, prompts: int) -> int:
    """Optimizer steps of the whole run over a data set of ``prompts``.

    Raises:
        ConfigError: if there are none, or fewer than the learning-rate schedule needs.
    """
    grpo, sched = cfg.trainer.grpo, OmegaConf.select(cfg, "model.optim.sched") or {}
    rl_steps = grpo.max_epochs * (prompts // grpo.num_prompts_per_grpo_step)
    if grpo.max_steps is not None and grpo.max_steps >= 0:
        rl_steps = min(rl_steps, grpo.max_steps)
    rollout = grpo.num_prompts_per_grpo_step * grpo.samples_per_prompt
    steps = rl_steps * rollout // cfg.model.global_batch_size
    rule = f"leaves no RL step: the training data hold {prompts} prompts, an RL step takes "
    rule += f"{grpo.num_prompts_per_grpo_step}"
    require(rl_steps > 0, "trainer.grpo.max_steps", grpo.max_steps, rule)
    apart = (sched.get("warmup_steps") or 0) + (sched.get("constant_steps") or 0)
    rule = (
        f"warmup_steps + constant_steps={apart} must be less than the run's {steps} optimizer steps"
    )
    require(apart < steps, "model.optim.sched", sched.get("name"), rule)
    return steps


def check_restated(cfg: DictConfig, apo: ApoSettings) -> None:
    """Host keys that restate what ``model.apo`` decides: null, or the same."""
    for key, meant in restated(apo.objective, apo.regularizers).items():
        value = OmegaConf.select(cfg, key)
        if value is None or value == meant:
            continue
        name = apo.objective.name
        if meant is None:
            raise ConfigError(
                f"{key}={value}: has no meaning under objective={name}; leave it null"
            )
        raise ConfigError(
            f"{key}={value}: contradicts objective={name}, for which it is {meant}; leave it null "
            "and set model.apo"
        )


def restated(objective: Objective, regularizers: Regularizers) -> Mapping[str, Any]:
    """What each of the host's loss keys would have to say; None where it can say nothing true."""
    clips = isinstance(objective, ClippedRatio)
    low, high = (objective.clip_low, objective.clip_high) if clips else (None, None)  # type: ignore
    aggregation = getattr(objective, "aggregation", None)
    kl_coef = regularizers.kl_coef if regularizers.needs_reference_in_loss else 0.0
    return {
        "trainer.grpo.initial_policy_kl_penalty": kl_coef,
        "trainer.grpo.use_leave_one_out_baseline": objective.advantages == "rloo",
        "trainer.grpo.normalize_rewards": objective.advantages == "zscore",
        "trainer.grpo.importance_sample_correct": False,
        "model.grpo.initial_policy_kl_penalty": kl_coef,
        "model.grpo.entropy_bonus": regularizers.entropy_coef,
        "model.grpo.ratio_eps": low if low == high else None,
        "model.grpo.ratio_eps_low": low,
        "model.grpo.ratio_eps_high": high,
        "model.grpo.dapo.token_loss": aggregation in _TOKEN_MEANS,
        "model.grpo.dapo.clip_higher": low != high if clips else False,
    }


def check_backend(cfg: DictConfig) -> None:
    """The sampler: one that this host can refit, with all that is trained."""
    backend = cfg.trainer.grpo.inference_backend
    kind, rule = backend.type, "the host has no other way to sample; use true"
    require(bool(backend.enable), f"{_BACKEND}.enable", backend.enable, rule)
    rule = "is broken in this host: it would need a copy of the weights that only "
    rule += f"{' and '.join(REFITTED_BACKENDS)} make"
    require(kind != "trt_llm", f"{_BACKEND}.type", kind, rule)
    rule = f"must be one of {', '.join(REFITTED_BACKENDS)}"
    require(kind in REFITTED_BACKENDS, f"{_BACKEND}.type", kind, rule)
    enabled = [name for name, section in backend.config.items() if section.get("enable")]
    rule = f"must be the only backend enabled in {_BACKEND}.config, but enabled are: "
    rule += ", ".join(enabled) or "none"
    require(enabled == [kind], f"{_BACKEND}.type", kind, rule)
    copied = OmegaConf.select(cfg, "model.grpo.inference_backend")
    rule = f"differs from {_BACKEND}, of which it is the actor's copy"
    require(copied == backend, "model.grpo.inference_backend", copied, rule)
    scheme = OmegaConf.select(cfg, "model.peft.peft_scheme", default="none")
    rule = f"must be none: with {_BACKEND}.type={kind} the host sends no adapter to the sampler"
    require(scheme == "none", "model.peft.peft_scheme", scheme, rule)
    ranks = OmegaConf.select(cfg, "model.context_parallel_size", default=1) or 1
    rule = f"needs {_BACKEND}.reshard=true: each context rank would sample other answers to the "
    rule += "prompts that they share"
    require(ranks == 1 or bool(backend.reshard), "model.context_parallel_size", ranks, rule)


def check_model(model: DictConfig) -> None:
    """Norms of query and key; a checkpoint's own configuration may ask for them too."""
    if not model.get("qk_layernorm"):
        return
    rule = "has no norms of query and key, which model.qk_layernorm=true asks for; use true"
    require(bool(model.get("mcore_gpt", True)), "model.mcore_gpt", model.get("mcore_gpt"), rule)
    size = model.get("tensor_model_parallel_size") or 1
    rule = "needs model.sequence_parallel=true: every tensor rank holds the norms of query and key "
    rule += "(model.qk_layernorm), and without it they would drift apart"
    fits = size == 1 or bool(model.get("sequence_parallel"))
    require(fits, "model.tensor_model_parallel_size", size, rule)


def check_inputs(cfg: DictConfig) -> None:
    """The files that a run starts from."""
    key = "pretrained_checkpoint.restore_from_path"
    path = OmegaConf.select(cfg, key)
    rule = "must name the .nemo file or folder of the model to start from"
    require(path is not None and Path(path).exists(), key, path, rule)
    for split in ("train", "validation"):
        key = f"model.data.data_prefix.{split}"
        files = OmegaConf.select(cfg, key)
        rule = "must be a list of one JSON-lines file that exists; the host reads only the first"
        fits = isinstance(files, ListConfig) and len(files) == 1 and Path(files[0]).is_file()
        require(fits, key, files, rule)


def data_parallel_size(cfg: DictConfig) -> int:
    """Data-parallel ranks of the layout.

    Raises:
        ConfigError: if the sizes do not divide the number of ranks.
    """
    world = cfg.trainer.num_nodes * cfg.trainer.devices
    sizes = {
        key: OmegaConf.select(cfg.model, key, default=1) or 1
        for key in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
        )
    }
    product = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
    product *= sizes["context_parallel_size"]
    shown = " x ".join(f"{key}={value}" for key, value in sizes.items())
    rule = f"must divide the number of ranks, num_nodes x devices={world}"
    require(world % product == 0, f"model: {shown}", product, rule)
    return world // product


def check_layout(cfg: DictConfig) -> None:
    """Parallel sizes against the number of ranks and the batch sizes."""
    ranks, batch_size = data_parallel_size(cfg), cfg.model.global_batch_size
    share = ranks * cfg.model.micro_batch_size
    require(
        batch_size % share == 0,
        "model.global_batch_size",
        batch_size,
        f"must be a multiple of data-parallel size x micro_batch_size={share}",
    )
    prompts = cfg.trainer.grpo.num_prompts_per_grpo_step
    rule = f"must be a multiple of the data-parallel size={ranks}"
    require(prompts % ranks == 0, "trainer.grpo.num_prompts_per_grpo_step", prompts, rule)


def _check_sizes(cfg: DictConfig) -> None:
    """Numbers that the other rules reckon with."""
    for key in _SIZES:
        value = OmegaConf.select(cfg, key, throw_on_missing=True)
        fits = type(value) is int and value >= 1
        require(fits, key, value, "must be a whole number of at least 1")


def _check_sampling(sampling: DictConfig) -> None:
    for key, allowed in _PLAIN_SAMPLING.items():
        value = sampling.get(key, allowed[0])
        shown = " or ".join(str(choice) for choice in allowed)
        rule = f"must be {shown}: the log-probs that are trained are those of the plain policy"
        require(value in allowed, f"model.grpo.sampling_params.{key}", value, rule)


def _check_optimizer(cfg: DictConfig) -> None:
    clip = cfg.trainer.grpo.gradient_clip_val
    rule = "must be > 0: the host measures the gradient norm only when it clips, and a gradient "
    rule += "that is not finite could not be skipped"
    require(bool(clip) and clip > 0.0, "trainer.grpo.gradient_clip_val", clip, rule)
    overlap = bool(cfg.model.optim.get("overlap_param_sync"))
    rule = "must be false: coefficients are refreshed by a forward pass right after an optimizer "
    rule += "step, which might still see some of the weights before it"
    require(not overlap, "model.optim.overlap_param_sync", overlap, rule)
    name = cfg.model.optim.name
    rule = "clips inside its step, so the host's GRPO trainer sees no gradient norm"
    require(name not in _CLIPS_INSIDE, "model.optim.name", name, rule)
