"""Which ranks still answer, so that those that do not can be named and waited for no longer.

A collective that waits for a lost rank ends on the others by a closed connection or by a timeout,
with a message that tells nothing about who is missing; some waits know no timeout of ours at all.
So every rank counts up a key in the process group's store, from a thread of its own, and watches
the count of the next rank. A rank that was killed or stopped, or whose machine is gone, counts no
more; one that is alive but stuck in Python does.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

INTERVAL_S = 0.5
# A rank whose count stands still for so many intervals is silent.
_PATIENCE = 5
_LEFT = "left"


class RanksLost(RuntimeError):
    """Some ranks no longer answer; the message names them."""


@dataclass(frozen=True)
class Beat:
    """The last that a rank was heard to say."""

    rank: int
    count: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Liveness:
    """Counts for this rank and watches the next one while it is entered as a context.

    Args:
        timeout_s: seconds of silence after which this process ends, with status 1.
    """

    def __init__(self, timeout_s: float) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._threads = [
            threading.Thread(target=self._while_it_answers, args=(work,), daemon=True)
            for work in (self._beat, self._watch)
        ]

    def __enter__(self) -> "Liveness":
        if self._ranks > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """This rank leaves of its own accord, which is not silence."""
        if self._ranks == 1 or self._stopped.is_set():
            return
        with self._writing:
            self._stopped.set()
            with contextlib.suppress(RuntimeError):  # the store may be lost
                self._store.set(_key(self._rank), _LEFT)

    def _while_it_answers(self, work: Callable[[], None]) -> None:
        # Without the store nobody would read or be read.
        with contextlib.suppress(RuntimeError):
            work()

    def _beat(self) -> None:
        count = 0
        while not self._stopped.wait(INTERVAL_S if count else 0.0):
            count += 1
            with self._writing:
                if not self._stopped.is_set():
                    beat = f"{count} {os.getpid()} {socket.gethostname()}"
                    self._store.set(_key(self._rank), beat)

    def _watch(self) -> None:
        """End this process when the next rank is lost: the main thread may wait for ever."""
        heard, since = None, time.monotonic()
        while not self._stopped.wait(INTERVAL_S):
            beat = self._read((self._rank + 1) % self._ranks)
            if beat is None or beat != heard:
                heard, since = beat, time.monotonic()
            elif time.monotonic() - since > self._timeout_s:
                silent = self.silent()
                if silent and not self._stopped.is_set():
                    end_silent(silent)
                    print(f"nemo-apo: {told(silent)}", file=sys.stderr, flush=True)
                    os._exit(1)

    def silent(self) -> list[Beat]:
        """Ranks that do not answer and did not leave; takes some intervals.

        Raises:
            RanksLost: if the store itself does not answer.
        """
        try:
            before = [self._read(rank) for rank in range(self._ranks)]
            time.sleep(_PATIENCE * INTERVAL_S)
            after = [self._read(rank) for rank in range(self._ranks)]
        except RuntimeError as error:
            raise RanksLost(f"the rank that holds the store is lost: {error}") from error
        return [
            beat
            for beat, later in zip(before, after, strict=True)
            if beat is not None and beat == later
        ]

    def _read(self, rank: int) -> Beat | None:
        """The last that a rank was heard to say; None if it left."""
        if not self._store.check([_key(rank)]):
            return Beat(rank, 0, "never heard of", 0)
        text = self._store.get(_key(rank)).decode()
        if text == _LEFT:
            return None
        count, pid, host = text.split(" ", 2)
        return Beat(rank, int(count), host, int(pid))


def told(silent: Sequence[Beat]) -> str:
    """Who is lost, for a person."""
    return f"{', '.join(map(str, silent))} stopped answering"


def _key(rank: int) -> str:
    return f"nemo_apo/alive/{rank}"


def end_silent(silent: Sequence[Beat]) -> None:
    """Kill silent ranks of this machine: a launcher would wait for a stopped one to end itself."""
    host = socket.gethostname()
    for beat in silent:
        if beat.host == host and beat.pid > 0:
            with contextlib.suppress(ProcessLookupError):  # it may be dead already
                os.kill(beat.pid, signal.SIGKILL)
