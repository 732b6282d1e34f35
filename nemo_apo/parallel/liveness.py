"""Which ranks still answer, so that those that do not can be named and waited for no longer.

A collective that waits for a lost rank ends on the others by a closed connection or by a timeout,
with a message that tells nothing about who is missing; some waits know no timeout of ours at all.
So every rank counts up a key in the process group's store, from a thread of its own, and watches
the count of the next rank. A rank that was killed or stopped, or whose machine is gone, counts no
more; one that is alive but stuck in Python does. The store itself may be lost: a third thread,
which never asks it anything, ends the process then.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass

import torch.distributed as dist

from nemo_apo.parallel.process_identity import Process, kill, this_process

INTERVAL_S = 0.5
# A rank whose count stands still for so many intervals is silent.
_PATIENCE = 8
# What the store is given to answer in, beyond the time that the work itself takes.
_STORE_S = 3.0
_LEFT = "left"
# Holds the silent ranks that some rank found first.
_VERDICT = "nemo_apo/lost"
_NO_STORE = "the store of the process group does not answer"


class RanksLost(RuntimeError):
    """Some ranks, or the store of all, no longer answer; the message names them."""


@dataclass(frozen=True)
class Beat:
    """The last that a rank was heard to say; no process if it never said anything."""

    rank: int
    count: int
    process: Process | None

    def __str__(self) -> str:
        if self.process is None:
            return f"rank {self.rank} (never heard of)"
        return f"rank {self.rank} ({self.process.host}, process {self.process.pid})"


class Liveness:
    """Counts for this rank and watches the next one while it is entered as a context.

    Args:
        timeout_s: seconds of silence, of the next rank or of the store, after which this process
            ends, with status 1.
    """

    def __init__(self, timeout_s: float) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._stopped, self._answered = threading.Event(), threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._watching = [
            threading.Thread(target=work, daemon=True)
            for work in (self._watch_next, self._watch_store)
        ]

    def __enter__(self) -> "Liveness":
        if self._ranks > 1:
            for thread in (self._beating, *self._watching):
                thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """This rank leaves of its own accord, which is not silence."""
        self._stopped.set()
        if self._ranks > 1:
            self._beating.join(_STORE_S)  # for ever, where the store hangs

    def silent(self) -> list[Beat]:
        """Other ranks that do not answer and did not leave; takes seconds, unless some rank knows.

        Raises:
            RanksLost: if the store itself does not answer.
        """
        if self._ranks == 1:
            return []
        found: futures.Future[list[Beat]] = futures.Future()

        def scan() -> None:
            try:
                found.set_result(self._scan())
            except RuntimeError as error:
                found.set_exception(error)

        threading.Thread(target=scan, daemon=True).start()
        try:
            return found.result(_PATIENCE * INTERVAL_S + _STORE_S)
        except futures.TimeoutError:
            raise RanksLost(_NO_STORE) from None
        except RuntimeError as error:
            raise RanksLost(f"{_NO_STORE}: {error}") from error

    def _beat(self) -> None:
        process, count = this_process(), 0
        with _until_the_store_is_lost():
            while not self._stopped.wait(INTERVAL_S if count else 0.0):
                count += 1
                beat = Beat(self._rank, count, process)
                self._store.set(_key(self._rank), json.dumps(asdict(beat)))
            self._store.set(_key(self._rank), _LEFT)

    def _watch_next(self) -> None:
        """End this process when the next rank is lost: the main thread may wait for ever."""
        heard, since = None, time.monotonic()
        with _until_the_store_is_lost():
            while not self._stopped.wait(INTERVAL_S):
                [beat] = self._read([(self._rank + 1) % self._ranks])
                if beat is None or beat != heard:
                    heard, since = beat, time.monotonic()
                elif time.monotonic() - since > self._timeout_s:
                    silent = self._scan()
                    if silent and not self._stopped.is_set():
                        end_silent(silent)
                        os._exit(1)

    def _watch_store(self) -> None:
        """End this process when the store is lost. Asks it nothing, for that may take for ever."""
        # Intervals, not a clock: while a person has stopped the whole job, no time goes by.
        unanswered = 0
        while not self._stopped.wait(INTERVAL_S):
            unanswered = 0 if self._answered.is_set() else unanswered + 1
            self._answered.clear()
            if unanswered * INTERVAL_S > self._timeout_s + _STORE_S:
                print(f"nemo-apo: {_NO_STORE}", file=sys.stderr, flush=True)
                os._exit(1)

    def _scan(self) -> list[Beat]:
        before = self._read(range(self._ranks))
        for _ in range(_PATIENCE):
            if self._store.check([_VERDICT]):
                return self._others(self._store.get(_VERDICT))
            self._answered.set()
            time.sleep(INTERVAL_S)
        after = self._read(range(self._ranks))
        silent = [
            asdict(beat)
            for beat, later in zip(before, after, strict=True)
            if beat is not None and beat == later and beat.rank != self._rank
        ]
        if not silent:
            return []
        # Another may have been first meanwhile: its verdict is what comes back.
        return self._others(self._store.compare_set(_VERDICT, "", json.dumps(silent)))

    def _others(self, verdict: bytes) -> list[Beat]:
        """The ranks of a verdict without this one, which was silent if it is among them."""
        return [beat for beat in map(_beat_of, json.loads(verdict)) if beat.rank != self._rank]

    def _read(self, ranks: Sequence[int]) -> list[Beat | None]:
        """The last that each rank was heard to say; None if it left."""
        texts = self._texts(ranks)
        self._answered.set()
        return [
            None if text == _LEFT else _beat_of(json.loads(text)) if text else Beat(rank, 0, None)
            for rank, text in zip(ranks, texts, strict=True)
        ]

    def _texts(self, ranks: Sequence[int]) -> list[str]:
        keys = [_key(rank) for rank in ranks]
        if self._store.check(keys):
            return [text.decode() for text in self._store.multi_get(keys)]
        # Reading a key that is not there would wait for it: one by one, until all have entered.
        there = [self._store.check([key]) for key in keys]
        return [
            self._store.get(key).decode() if exists else ""
            for key, exists in zip(keys, there, strict=True)
        ]


@contextlib.contextmanager
def _until_the_store_is_lost() -> Iterator[None]:
    # Nobody would read or be read then.
    with contextlib.suppress(RuntimeError):
        yield


def _key(rank: int) -> str:
    return f"nemo_apo/alive/{rank}"


def _beat_of(value: dict) -> Beat:
    process = value["process"]
    return Beat(value["rank"], value["count"], None if process is None else Process(**process))


def told(silent: Sequence[Beat]) -> str:
    """Who is lost, for a person."""
    return f"{', '.join(map(str, silent))} stopped answering"


def end_silent(silent: Sequence[Beat]) -> None:
    """Say who is lost, then kill those of this machine: a launcher would wait for a stopped one.

    In this order, for the launcher may end this process in answer to the other's end.
    """
    print(f"nemo-apo: {told(silent)}", file=sys.stderr, flush=True)
    for beat in silent:
        if beat.process is not None:
            kill(beat.process)
