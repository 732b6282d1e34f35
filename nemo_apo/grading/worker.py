"""A worker process: the supervisor that grades one sample at a time in a process it can kill.

Started by ``nemo_apo.grading.pool`` as a fresh interpreter, so that it holds none of the trainer's
threads, sockets or devices. It has one thread and never runs foreign code itself. Messages to the
trainer start with a letter: R (ready for a sample), G (a grade), B (broken, and why).
"""

import contextlib
import os
import select
import signal
import time

from nemo_apo.grading import child
from nemo_apo.grading.frames import BadFrame, FrameReader, write_frame
from nemo_apo.grading.outcome import REASONS, Grade
from nemo_apo.grading.processes import (
    adopt_orphans,
    descendants,
    kill_descendants,
    signal_at_parents_death,
)
from nemo_apo.grading.settings import Order

IS_READY, IS_GRADE, IS_BROKEN = b"R", b"G", b"B"
# After these the grading process is as good as before.
_HARMLESS = ("", "raised", "type", "not_finite", "refused")
# How often a running grader is looked at, seconds.
_TICK_S = 0.05
# How long a process may take to end after its pipe, seconds.
_LAST_BREATH_S = 1.0
_REPLY_BYTES = 1024
_MESSAGE_BYTES = 2**28


class TrainerGone(Exception):
    """Nobody waits for grades any more."""


class _Broken(Exception):
    """The grading process cannot be started; the message says why."""


class _NoReply(Exception):
    """The grading process must be replaced; holds the failed grade."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.grade = Grade.failed(reason, detail)


def main() -> None:
    """Serve the trainer on the other side of standard input and output until it is gone."""
    requests, replies = _private_pipes()
    trainer = os.getppid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGUSR1, lambda *_: _leave_if_orphaned(trainer))
    # A trainer that does not listen to signals yet holds them back, and this process inherits that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    signal_at_parents_death(signal.SIGUSR1)
    adopt_orphans()
    reader = FrameReader(requests, _MESSAGE_BYTES)
    try:
        order = reader.wait()
        if order is not None:
            _Supervisor(Order.from_bytes(order), reader, replies, trainer).serve()
    except (TrainerGone, BrokenPipeError):
        return
    finally:
        kill_descendants()


def _leave(*_: object) -> None:
    """End at once. Nothing is raised: it would cut short the killing that is under way already."""
    kill_descendants()
    os._exit(0)


def _leave_if_orphaned(trainer: int) -> None:
    """The signal also comes when a thread of the trainer ends that started this process."""
    if os.getppid() != trainer:
        _leave()


def _private_pipes() -> tuple[int, int]:
    """The pipes to the trainer, moved where a print or an ``input()`` cannot reach them."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    return requests, replies


class _Supervisor:
    def __init__(self, order: Order, requests: FrameReader, replies: int, trainer: int) -> None:
        self._order = order
        self._settings = order.settings
        self._requests = requests
        self._replies = replies
        self._trainer = trainer
        self._number = 0
        self._pid = 0
        self._to_child = -1
        self._from_child = FrameReader(-1, _REPLY_BYTES)

    def serve(self) -> None:
        """Grade samples as they come; on return the trainer has closed the pipe."""
        try:
            self._start()
            write_frame(self._replies, IS_READY)
            while (request := self._requests.wait()) is not None:
                self._serve_one(request)
        except _Broken as why:
            write_frame(self._replies, IS_BROKEN + str(why).encode(errors="replace"))

    def _serve_one(self, request: bytes) -> None:
        if self._readable(0.0):  # it ended since its last answer, or speaks unasked
            self._renew()
        grade = self._grade(request)
        write_frame(self._replies, IS_GRADE + grade.to_bytes())
        if grade.reason not in _HARMLESS or self._has_strays():
            self._renew()
        write_frame(self._replies, IS_READY)

    def _grade(self, sample: bytes) -> Grade:
        self._number += 1
        try:
            write_frame(
                self._to_child, self._number.to_bytes(child.NUMBER_BYTES, "little") + sample
            )
            return self._reply(self._settings.wall_s)
        except BrokenPipeError:
            return _ended(self._how_it_ended()).grade
        except _NoReply as failure:
            return failure.grade

    def _start(self) -> None:
        """Fork the grading process and wait until it has its grader."""
        self._number = 0
        requests, self._to_child = os.pipe()
        from_child, replies = os.pipe()
        self._from_child = FrameReader(from_child, _REPLY_BYTES)
        self._pid = os.fork()
        if self._pid == 0:
            self._be_child(requests, replies)
        os.close(requests)
        os.close(replies)
        try:
            hello = self._reply(self._settings.start_s)
        except _NoReply as failure:
            raise _Broken(f"{REASONS[failure.grade.reason]}: {failure.grade.detail}") from None
        if hello.value != child.READY:
            raise _Broken(hello.detail)
        if self._pid not in descendants(os.getpid()):
            raise _Broken("/proc does not list the children of a process, so none can be found")

    def _be_child(self, requests: int, replies: int) -> None:
        try:
            for fd in (self._requests.fd, self._replies, self._to_child, self._from_child.fd):
                os.close(fd)
            # What a grader prints is never kept: any place for it would fill up.
            os.dup2(1, 2)
            child.main(self._order, requests, replies)
        finally:
            os._exit(1)

    def _renew(self) -> None:
        """Replace the grading process, and all that it has started, by a new one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        kill_descendants()
        os.close(self._to_child)
        os.close(self._from_child.fd)
        self._start()

    def _has_strays(self) -> bool:
        """Whether processes that the grader started outlive its answer."""
        return descendants(os.getpid()) != [self._pid]

    def _reply(self, limit_s: float) -> Grade:
        deadline = time.monotonic() + limit_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _NoReply("timeout", f"after {limit_s:g} s")
            if self._readable(min(left, _TICK_S)):
                if not self._from_child.fill():
                    raise _ended(self._how_it_ended())
                if (grade := self._popped()) is not None:
                    return grade
            elif len(descendants(self._pid)) > self._settings.processes:
                raise _NoReply("processes", f"more than {self._settings.processes}")

    def _popped(self) -> Grade | None:
        try:
            message = self._from_child.pop()
            if message is None:
                return None
            if int.from_bytes(message[: child.NUMBER_BYTES], "little") != self._number:
                raise _NoReply("protocol", "answered something else")
            return Grade.from_bytes(message[child.NUMBER_BYTES :])
        except (BadFrame, ValueError) as error:
            raise _NoReply("protocol", str(error)) from None

    def _readable(self, wait_s: float) -> bool:
        """Whether the grading process has sent something; looks at the trainer, too."""
        poll = select.poll()
        poll.register(self._from_child.fd, select.POLLIN)
        poll.register(self._requests.fd, 0)
        events = dict(poll.poll(wait_s * 1000.0))
        if self._requests.fd in events or os.getppid() != self._trainer:
            raise TrainerGone
        return self._from_child.fd in events

    def _how_it_ended(self) -> str:
        """How the grading process ended, which has closed its pipe; it may not have ended yet."""
        # Not collected yet, so that its number cannot belong to another process.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        deadline = time.monotonic() + _LAST_BREATH_S
        while (end := os.waitid(os.P_PID, self._pid, look)) is None:
            if time.monotonic() > deadline:
                return "closed its pipe"
            time.sleep(0.001)
        by_itself = end.si_code == os.CLD_EXITED
        return f"status {end.si_status}" if by_itself else signal.Signals(end.si_status).name


def _ended(how: str) -> _NoReply:
    return _NoReply("cpu") if how == signal.SIGXCPU.name else _NoReply("exited", how)
