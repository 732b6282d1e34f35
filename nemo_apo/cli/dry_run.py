"""What a run would do, told without doing any of it: no process group, no file, no Megatron."""

from pathlib import Path

from nemo_apo.config import Config, ModelConfig, padded_vocab_size
from nemo_apo.record import CONFIG_FILE


def plan(config: Config, world_size: int) -> str:
    """The plan of a valid configuration on ``world_size`` ranks, one line per fact."""
    steps, update, rollout = config.run.steps, config.update, config.rollout
    per_step = update.mini_batches * update.epochs
    samples = rollout.prompts * rollout.group_size
    rows = {
        "run folder": _folder(config),
        "task": f"{config.task.name}, reward {config.task.reward}",
        "objective": config.objective.name,
        "schedule": _schedule(config),
        "model": f"{config.model.name}, {parameter_count(config):,} parameters",
        "layout": _layout(config, world_size),
        "RL steps": f"{steps}",
        "samples": f"{samples} per RL step "
        f"({rollout.prompts} prompts x {rollout.group_size} completions), {samples * steps} in all",
        "optimizer steps": f"{per_step} per RL step "
        f"({update.mini_batches} mini-batches x {update.epochs} epochs), {per_step * steps} in all",
        "warm start": _warm_start(config),
    }
    width = max(map(len, rows))
    return "\n".join(f"{label.ljust(width)}  {text}" for label, text in rows.items())


def _folder(config: Config) -> str:
    folder = Path(config.run.root) / config.run.name
    if not (folder / CONFIG_FILE).exists():
        return str(folder)
    return f"{folder} (holds a run already; run.if_exists={config.run.if_exists})"


def _schedule(config: Config) -> str:
    if not config.objective.uses_alpha:
        return f"none ({config.objective.name} has no alpha)"
    return str(getattr(config.schedule, "name"))  # noqa: B009


def _layout(config: Config, world_size: int) -> str:
    tensor = config.parallel.tensor_model_parallel_size
    pipeline = config.parallel.pipeline_model_parallel_size
    data = world_size // (tensor * pipeline)
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return f"{ranks} = TP {tensor} x PP {pipeline} x DP {data}"


def _warm_start(config: Config) -> str:
    warm_start = config.warm_start
    if warm_start.load is not None:
        return f"weights from {warm_start.load}"
    if warm_start.steps == 0:
        return "none"
    return f"{warm_start.steps} supervised steps of {warm_start.batch_size} demonstrations"


def parameter_count(config: Config) -> int:
    """Parameters of the whole model, padded vocabulary included."""
    model = config.model
    vocab_size = padded_vocab_size(config.task.vocab_size, model)
    matrices = 1 if model.tied_embeddings else 2
    outside = matrices * vocab_size * model.hidden_size + model.hidden_size
    return outside + model.num_layers * _layer_parameters(model)


def _layer_parameters(model: ModelConfig) -> int:
    hidden, head = model.hidden_size, model.kv_channels
    queries = model.num_attention_heads * head
    keys_and_values = 2 * model.num_query_groups * head
    attention = hidden * (queries + keys_and_values) + queries * hidden
    # SwiGLU: gate and up projections, then down.
    feed_forward = 3 * hidden * model.ffn_hidden_size
    norms = 2 * hidden + (2 * head if model.qk_layernorm else 0)
    return attention + feed_forward + norms
