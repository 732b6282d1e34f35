"""From the name of a grader to something that grades a sample."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from nemo_apo.grading.graders import GRADERS
from nemo_apo.grading.settings import TASK_GRADER, Order, Sample
from nemo_apo.tasks import Prompt, Task

SampleGrader = Callable[[Sample], object]


def load(order: Order) -> SampleGrader:
    """The grader of an order, imported here: in a worker.

    Raises:
        TypeError: if a path leads to something that cannot be called.
        Exception: whatever importing it raises.
    """
    grader = order.settings.grader
    if grader == TASK_GRADER:
        return of_task(find(order.task_class)(**order.task_fields))
    if grader in GRADERS:
        return of_text(GRADERS[grader](order.settings))
    function = find(grader)
    if not callable(function):
        raise TypeError(f"is a {type(function).__name__}, which cannot be called")
    return of_text(function)


def of_task(task: Task) -> SampleGrader:
    """A task's own grader, which is given token ids."""

    def grade(sample: Sample) -> object:
        prompt = Prompt(sample.prompt, sample.prompt_tokens)
        return task.grade(prompt, list(sample.completion_tokens))

    return grade


def of_text(function: Callable[[str, str, str], object]) -> SampleGrader:
    """A grader that is given the texts of prompt, completion and reference."""
    return lambda sample: function(sample.prompt, sample.completion, sample.reference)


def find(path: str) -> Any:
    """What stands at "package.module:name"."""
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
