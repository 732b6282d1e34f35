"""What a run would do, told without doing any of it: no process group, no file, no Megatron."""

from pathlib import Path

from nemo_apo.compose.hf_model import checkpoint_line
from nemo_apo.config import Config, vocab_size
from nemo_apo.planning.run_memory import RunMemory, run_memory
from nemo_apo.planning.settings import GPU_MEMORY
from nemo_apo.planning.shapes import Shapes
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
        "model": f"{config.model.name}, {_shapes(config).parameters:,} parameters",
        "layout": _layout(config, world_size),
        "memory": _memory(run_memory(config, world_size)),
        "RL steps": f"{steps}",
        "samples": f"{samples} per RL step "
        f"({rollout.prompts} prompts x {rollout.group_size} completions), {samples * steps} in all",
        "optimizer steps": f"{per_step} per RL step "
        f"({update.mini_batches} mini-batches x {update.epochs} epochs), {per_step * steps} in all",
        "warm start": _warm_start(config),
    }
    width = max(map(len, rows))
    lines = [f"{label.ljust(width)}  {text}" for label, text in rows.items()]
    files = [*checkpoint_line(config), *config.task.check_files()]
    return "\n".join([*lines, *(f"{'file'.ljust(width)}  {line}" for line in files)])


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
    context = config.parallel.context_parallel_size
    data = world_size // (tensor * pipeline * context)
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return f"{ranks} = TP {tensor} x PP {pipeline} x CP {context} x DP {data}"


def _shapes(config: Config) -> Shapes:
    return Shapes.of(config.model, vocab_size(config))


def _memory(memory: RunMemory) -> str:
    large = [name for name, size in GPU_MEMORY.items() if memory.total <= size]
    where = f"fits on {', '.join(large)}" if large else f"fits on none of {', '.join(GPU_MEMORY)}"
    return f"{memory} on the fullest rank, computed; {where}"


def _warm_start(config: Config) -> str:
    warm_start = config.warm_start
    if warm_start.load is not None:
        return f"weights from {warm_start.load}"
    if warm_start.steps == 0:
        return "none"
    return f"{warm_start.steps} supervised steps of {warm_start.batch_size} demonstrations"
