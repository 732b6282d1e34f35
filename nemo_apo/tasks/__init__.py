"""Tasks: prompts, demonstrations for a warm start, and verifiable rewards."""

from nemo_apo.tasks.data_sets import DatasetTask, Gsm8kTask, MathTask
from nemo_apo.tasks.interface import Prompt, PromptTurn, Task
from nemo_apo.tasks.sort import SortTask

# A task by name.
TASKS: dict[str, type[SortTask | MathTask | Gsm8kTask | DatasetTask]] = {
    "sort": SortTask,
    "math": MathTask,
    "gsm8k": Gsm8kTask,
    "dataset": DatasetTask,
}

__all__ = ["TASKS", "Prompt", "PromptTurn", "SortTask", "Task"]
