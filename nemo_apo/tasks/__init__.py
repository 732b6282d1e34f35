"""Tasks: prompts, demonstrations for a warm start, and verifiable rewards."""

from nemo_apo.tasks.interface import Prompt, PromptTurn, Task
from nemo_apo.tasks.sort import SortTask

# A task by name.
TASKS: dict[str, type[SortTask]] = {"sort": SortTask}

__all__ = ["TASKS", "Prompt", "PromptTurn", "SortTask", "Task"]
