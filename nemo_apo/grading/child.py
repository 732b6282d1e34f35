"""The process that calls the grader. It is forked by a supervisor and may be killed any time."""

import os
import signal
import sys

from nemo_apo.grading.frames import FrameReader, write_frame
from nemo_apo.grading.limits import allow_cpu, limit_this_process
from nemo_apo.grading.loading import SampleGrader, load
from nemo_apo.grading.outcome import Grade, attempt
from nemo_apo.grading.processes import signal_at_parents_death
from nemo_apo.grading.settings import Order, Sample

# The reply to being started: a grade of this value, or one that failed and says why.
READY = 1.0
# Replies carry the number of the request, so that an answer that comes late is not taken for
# the next one.
NUMBER_BYTES = 8
_START = 0
_REQUEST_BYTES = 2**28


def main(order: Order, requests: int, replies: int) -> None:
    """Import the grader, say so, then grade one sample per request until the pipe ends."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal_at_parents_death(signal.SIGKILL)
    limit_this_process(order.settings)
    allow_cpu(int(order.settings.start_s) + 1)
    try:
        grader = load(order)
    except BaseException as error:
        _reply(replies, _START, Grade.failed("raised", f"{type(error).__name__}: {error}"))
        return
    _reply(replies, _START, Grade(READY))
    _serve(order, grader, FrameReader(requests, _REQUEST_BYTES), replies)


def _serve(order: Order, grader: SampleGrader, requests: FrameReader, replies: int) -> None:
    while (request := requests.wait()) is not None:
        number = int.from_bytes(request[:NUMBER_BYTES], "little")
        sample = Sample.from_bytes(request[NUMBER_BYTES:])
        allow_cpu(order.settings.cpu_s)
        grade = attempt(lambda s=sample: grader(s))
        _flush()
        _reply(replies, number, grade)


def _reply(replies: int, number: int, grade: Grade) -> None:
    write_frame(replies, number.to_bytes(NUMBER_BYTES, "little") + grade.to_bytes())


def _flush() -> None:
    """Empty Python's own buffers of what was printed; where they lead nothing is kept."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            # The grader may have put anything in its place, or closed it.
            continue
