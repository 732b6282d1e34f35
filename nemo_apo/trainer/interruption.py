"""Stopping early, on all ranks at once: a signal to any of them, or the time limit.

USR1 and TERM are noted where they arrive and acted upon where no collective is under way: every
rank calls ``requested`` there, and all get the same answer. A second signal ends the process at
once, with nothing saved; checkpoints are renamed into place when complete, so the last one stays
whole. Python runs handlers in the main thread between two of its own instructions, which never come
while that waits in a collective; so a thread hears of the signals too, and it is what ends the
process.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch

from nemo_apo.parallel.gather import highest

# A launcher passes a signal on to ranks that had it already: so soon after the first, it is the
# same one.
SAME_SIGNAL_S = 5.0
# Exit status of a run that was stopped early and saved: run it again to go on (BSD's EX_TEMPFAIL).
EXIT_STOPPED_EARLY = 75
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_REASONS = ("", "run.max_time is reached", "signal USR1", "signal TERM")


class StopCheck(Protocol):
    """Whether to stop early; collective."""

    def requested(self) -> str | None:
        """Why all ranks are to stop now, or None."""
        ...


class NeverStop:
    """For work that nobody interrupts."""

    def requested(self) -> str | None:
        return None


class StoppedEarly(Exception):
    """Raised on all ranks at once where work is abandoned; the message is the reason."""


def check_stop(check: StopCheck) -> None:
    """Raise ``StoppedEarly`` on all ranks if they are to stop now."""
    reason = check.requested()
    if reason is not None:
        raise StoppedEarly(reason)


class Interruption:
    """Listens for signals while it is entered as a context; see the module.

    Args:
        device: of this rank.
        max_time_s: seconds from now after which all ranks stop; None is no limit.
        clock: seconds.
    """

    def __init__(
        self,
        device: torch.device,
        max_time_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._clock = device, clock
        self._deadline = None if max_time_s is None else clock() + max_time_s
        self._reason = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python writes the number of every signal that has a handler here, from C and at once.
        self._heard, self._signals = os.pipe()
        os.set_blocking(self._signals, False)
        self._signals_before = signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        # A launcher may have held signals back until there is somebody to hear them.
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._signals_before)
        os.close(self._signals)
        self._listening.join()
        os.close(self._heard)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._reason == 0:
            self._reason = 2 + _SIGNALS.index(signal.Signals(number))

    def _listen(self) -> None:
        """End the process at a second signal; until the pipe is closed."""
        first: float | None = None
        while heard := os.read(self._heard, 1):
            number = heard[0]
            if number not in _SIGNALS:
                continue
            now = self._clock()
            if first is None:
                first = now
            elif now - first > SAME_SIGNAL_S:
                os._exit(128 + number)

    def requested(self) -> str | None:
        """Why all ranks are to stop now, or None; collective."""
        reason = self._reason
        if reason == 0 and self._deadline is not None and self._clock() >= self._deadline:
            reason = 1
        reason = highest(reason, self._device)
        return _REASONS[reason] if reason else None
