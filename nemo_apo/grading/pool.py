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
from dataclasses import dataclass, replace

from nemo_apo.grading.frames import BadFrame, FrameReader, FrameWriter
from nemo_apo.grading.limits import without_secrets
from nemo_apo.grading.outcome import Grade
from nemo_apo.grading.settings import GradingSettings, Order, Sample
from nemo_apo.grading.worker import IS_BROKEN, IS_GRADE, IS_READY

# Isolated, so that nothing beside the working directory shadows the standard library; the module
# search path is the trainer's, with the working directory last.
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from nemo_apo.grading.worker import main; main()"
_MESSAGE_BYTES = 4096
# A supervisor that is this much later than its limits has been stopped or starved, seconds.
_GRACE_S = 15.0
# How long the supervisors of a pool may take to end what they have started, seconds.
_LEAVE_S = 12.0


def longest_call_s(settings: GradingSettings) -> float:
    """Longest time that a rank takes for a call, workers started and given up included, seconds."""
    # A worker that ends before it is ready is launched a second time.
    start_s = 2.0 * (settings.start_s + _GRACE_S)
    return start_s + settings.total_s + settings.wall_s + _GRACE_S + _LEAVE_S


class GradingBroken(RuntimeError):
    """Workers cannot be started; the message says why."""


@dataclass
class _Worker:
    """A supervisor process.

    Attributes:
        index: of its sample, None if it has none.
        again: whether the one before it ended before it was ready.
    """

    process: subprocess.Popen[bytes]
    reader: FrameReader
    writer: FrameWriter
    deadline: float
    ready: bool = False
    index: int | None = None
    again: bool = False

    @property
    def idle(self) -> bool:
        return self.ready and self.index is None


class WorkerPool:
    """Workers that grade for one task; they start at once and end with ``close``, with the
    object, or with this process, however it ends.

    Args:
        order: task, grader and limits.

    Raises:
        GradingBroken: if a worker cannot start, for example because its grader cannot be imported,
            or ends before it is ready and so does the one in its place.
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
        worker.writer.put(sample)

    def _step(self, grades: list[Grade | None]) -> None:
        """Exchange messages with the workers, and replace those that ended or are overdue."""
        busy = [worker for worker in self._workers if not worker.idle]
        speaking = _exchange(busy)
        for worker in speaking:
            if worker.reader.fill():
                self._take_in(worker, grades)
            else:
                self._replace(worker, grades, Grade.failed("exited", "the supervisor ended"))
        for worker in busy:
            if worker not in speaking and time.monotonic() > worker.deadline:
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
            worker.ready, worker.again = True, False
        elif kind == IS_GRADE and worker.index is not None and not worker.writer.pending:
            grades[worker.index] = Grade.from_bytes(body)
            worker.index = None
            worker.deadline = time.monotonic() + self._settings.start_s + _GRACE_S
        else:
            raise ValueError("a message out of turn")

    def _replace(self, worker: _Worker, grades: list[Grade | None], failed: Grade) -> None:
        """A new supervisor in place of one; its sample, if it has one, has failed.

        One without a sample was not ready. A signal may have ended it; a second one in its place
        tells that from a worker that can never start.
        """
        status = _kill(worker.process)
        if worker.again:
            why = f"a worker ended before it was ready, twice ({failed.detail}, status {status})"
            raise GradingBroken(why)
        if worker.index is not None:
            grades[worker.index] = failed
        new = replace(self._launch(), again=worker.index is None)
        self._workers[self._workers.index(worker)] = new

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
        writer = FrameWriter(process.stdin.fileno())
        writer.put(self._order.to_bytes())
        reader = FrameReader(process.stdout.fileno(), _MESSAGE_BYTES)
        deadline = time.monotonic() + self._settings.start_s + _GRACE_S
        return _Worker(process, reader, writer, deadline)


def _exchange(workers: list[_Worker]) -> list[_Worker]:
    """Send what has not been sent; those that have something to read, after a second at most."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.reader.fd, selectors.EVENT_READ, worker)
            if worker.writer.pending:
                selector.register(worker.writer.fd, selectors.EVENT_WRITE, worker)
        wait_s = min((worker.deadline for worker in workers), default=0.0) - time.monotonic()
        events = selector.select(min(max(wait_s, 0.0), 1.0))
    for key, event in events:
        if event & selectors.EVENT_WRITE:
            key.data.writer.flush()
    return [key.data for key, event in events if event & selectors.EVENT_READ]


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
