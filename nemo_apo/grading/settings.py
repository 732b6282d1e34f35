"""What is graded, by what and within which limits."""

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

# The task's own ``grade``, in place of a grader by name or by path.
TASK_GRADER = "task"


@dataclass(frozen=True)
class GradingSettings:
    """The ``grading`` section; its rules stand in ``nemo_apo.config``.

    Attributes:
        grader: "task" (the task's own), a key of ``nemo_apo.grading.graders.GRADERS``, or
            "package.module:function" called with prompt, completion and reference texts.
        tolerance: of the ``numeric`` grader, relative to a reference above 1, absolute below.
        workers: worker processes per rank; 0 grades in the trainer's own process, without limits.
        wall_s: longest time for one sample, seconds.
        cpu_s: longest CPU time for one sample, seconds.
        memory_mib: address space of a grading process, MiB.
        file_mib: largest file that a grader may write, MiB.
        processes: most processes that a grader may have started at once.
        start_s: longest time for a worker to import its grader, seconds.
        total_s: longest time for all samples of one call on a rank, seconds; those that have not
            begun by then have failed.
    """

    grader: str = TASK_GRADER
    tolerance: float = 1e-6
    workers: int = 0
    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mib: int = 2048
    file_mib: int = 0
    processes: int = 16
    start_s: float = 60.0
    total_s: float = 300.0


@dataclass(frozen=True)
class Sample:
    """One completion to grade: texts for graders of text, token ids for the task's own.

    Attributes:
        prompt, prompt_tokens: the prompt.
        completion, completion_tokens: the completion, its end token included in the ids.
        reference: the right answer.
    """

    prompt: str
    prompt_tokens: tuple[int, ...]
    completion: str
    completion_tokens: tuple[int, ...]
    reference: str

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Sample":
        """The sample of ``to_bytes``."""
        values = json.loads(data)
        for key in ("prompt_tokens", "completion_tokens"):
            values[key] = tuple(values[key])
        return cls(**values)


@dataclass(frozen=True)
class Order:
    """What a worker is told at its start.

    Attributes:
        settings: limits and grader.
        task_class: "module:class" of the task, a dataclass.
        task_fields: its fields, values that JSON can hold.
    """

    settings: GradingSettings
    task_class: str
    task_fields: dict[str, Any]

    @classmethod
    def of(cls, settings: GradingSettings, task: Any) -> "Order":
        """The order for a task; only the class and the fields travel, never code."""
        assert is_dataclass(task)
        kind = type(task)
        values = {field.name: getattr(task, field.name) for field in fields(task)}
        return cls(settings, f"{kind.__module__}:{kind.__qualname__}", values)

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Order":
        """The order of ``to_bytes``."""
        values = json.loads(data)
        return cls(**{**values, "settings": GradingSettings(**values["settings"])})
