"""Worker processes on the trainer's side: samples go out one per free worker, grades come back."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_apo.grading.frames import BadFrame, FrameReader, write_frame
from nemo_apo.grading.limits import without_secrets
from nemo_apo.grading.outcome import Grade
from nemo_apo.grading.settings import Order, Sample
from nemo_apo.grading.worker import IS_BROKEN, IS_GRADE, IS_READY

# Isolated, so that nothing beside the working directory shadows the standard library; the module
# search path is the trainer's, with the working directory last.
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from nemo_apo.grading.worker import main; main()"
_MESSAGE_BYTES = 4096
# A supervisor that is this much later than its limits has been stopped or starved, seconds.
_GRACE_S = 15.0
_LEAVE_S = 12.0


class GradingBroken(RuntimeError):
    """Workers cannot be started; the message says why."""


@dataclass
class _Worker:
    """A supervisor process; ``index`` is its sample, None if it has none."""

    process: subprocess.Popen[bytes]
    reader: FrameReader
    deadline: float
    ready: bool = False
    index: int | None = None

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None


class WorkerPool:
    """Workers that grade for one task; they start at once and end with ``close``, with the
    object, or with this process, however it ends.

    Args:
        order: task, grader and limits.

    Raises:
        GradingBroken: if a worker cannot start, for example because its grader cannot be imported.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._settings = order.settings
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        try:
            for _ in range(order.settings.workers):
                self._workers.append(self._launch())
            while not all(worker.ready for worker in self._workers):
                self._step([None])
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the supervisors."""
        return [worker.process.pid for worker in self._workers]

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """One grade per sample, in order, within the settings' limits.

        Raises:
            GradingBroken: if a worker that had to be replaced cannot start again.
        """
        grades: list[Grade | None] = [None] * len(samples)
        waiting = deque(range(len(samples)))
        deadline = time.monotonic() + self._settings.total_s
        while any(grade is None for grade in grades):
            if time.monotonic() > deadline:
                self._give_up(grades, waiting)
            self._hand_out(samples, waiting)
            self._step(grades)
        return [grade for grade in grades if grade is not None]

    def close(self) -> None:
        """End all workers and all that they started."""
        self._finalizer()

    def _give_up(self, grades: list[Grade | None], waiting: deque[int]) -> None:
        """The time for all samples is over: those that have not begun have failed."""
        why = f"not begun within grading.total_s={self._settings.total_s:g}"
        while waiting:
            grades[waiting.popleft()] = Grade.failed("timeout", why)

    def _hand_out(self, samples: Sequence[Sample], waiting: deque[int]) -> None:
        for worker in self._workers:
            if waiting and worker.idle:
                self._send(worker, waiting[0], samples[waiting[0]].to_bytes())
                waiting.popleft()

    def _send(self, worker: _Worker, index: int, sample: bytes) -> None:
        worker.index, worker.ready = index, False
        worker.deadline = time.monotonic() + self._settings.wall_s + _GRACE_S
        assert worker.process.stdin is not None
        # Where it has ended, the end of its pipe is about to be read.
        with contextlib.suppress(BrokenPipeError):
            write_frame(worker.process.stdin.fileno(), sample)

    def _step(self, grades: list[Grade | None]) -> None:
        """Take in what the workers say, and replace those that ended or are overdue."""
        busy = [worker for worker in self._workers if not worker.idle]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.reader.fd, selectors.EVENT_READ, worker)
            wait_s = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
            ready = [key.data for key, _ in selector.select(min(max(wait_s, 0.0), 1.0))]
        for worker in ready:
            if worker.reader.fill():
                self._take_in(worker, grades)
            else:
                self._replace(worker, grades, Grade.failed("exited", "the supervisor ended"))
        for worker in busy:
            if worker not in ready and time.monotonic() > worker.deadline:
                self._replace(worker, grades, Grade.failed("timeout", "the supervisor is stuck"))

    def _take_in(self, worker: _Worker, grades: list[Grade | None]) -> None:
        try:
            while (message := worker.reader.pop()) is not None:
                self._read(worker, grades, message[:1], message[1:])
        except (BadFrame, ValueError) as error:
            self._replace(worker, grades, Grade.failed("protocol", str(error)))

    def _read(self, worker: _Worker, grades: list[Grade | None], kind: bytes, body: bytes) -> None:
        if kind == IS_BROKEN:
            raise GradingBroken(body.decode(errors="replace"))
        if kind == IS_READY:
            worker.ready = True
        elif kind == IS_GRADE and worker.index is not None:
            grades[worker.index] = Grade.from_bytes(body)
            worker.index = None
            worker.deadline = time.monotonic() + self._settings.start_s + _GRACE_S
        else:
            raise ValueError("a message out of turn")

    def _replace(self, worker: _Worker, grades: list[Grade | None], failed: Grade) -> None:
        """A new supervisor in place of one; its sample, if it has one, has failed."""
        status = _kill(worker.process)
        if worker.index is None:
            raise GradingBroken(f"a worker ended before it was ready, status {status}")
        grades[worker.index] = failed
        self._workers[self._workers.index(worker)] = self._launch()

    def _launch(self) -> _Worker:
        path = [os.path.abspath(folder) for folder in sys.path] + [os.getcwd()]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _BOOT, *path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=without_secrets(os.environ),
                start_new_session=True,
            )
        except OSError as error:
            raise GradingBroken(f"a worker could not be started: {error}") from None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            write_frame(process.stdin.fileno(), self._order.to_bytes())
        deadline = time.monotonic() + self._settings.start_s + _GRACE_S
        return _Worker(process, FrameReader(process.stdout.fileno(), _MESSAGE_BYTES), deadline)


def _end_all(workers: list[_Worker]) -> None:
    """End them. In a forked copy of the trainer, whose children they are not, this does nothing."""
    for worker in workers:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
    for worker in workers:
        # Where another process holds a copy of the pipe, closing it here does not end it.
        worker.process.terminate()
    deadline = time.monotonic() + _LEAVE_S
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        _kill(worker.process)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End a supervisor for good; its exit status. What it started dies with it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return status
