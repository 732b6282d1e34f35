"""The checks between nodes: who came, whose clock is off, who sees a folder, who is reached.

Everything goes through one store, which rank 0 (or torchrun) opens; every wait is bounded.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_apo.doctor.findings import Finding, failure, ok, warning
from nemo_apo.doctor.place import Place

_SKEW_S = 2.0
# How long a network file system may take to show what another node wrote.
_SHOW_S = 10.0
_POLL_S = 0.1
# With less than this left, the meeting point is not tried again; otherwise after a pause.
_SHORTEST_S, _PAUSE_S = 3.0, 1.0
_BYTES = 2**24


class Meeting:
    """The processes of a job, met at a store.

    Args:
        place: of this process.
        deadline: by ``time.monotonic``; nothing waits longer.

    Raises:
        RuntimeError: if the store cannot be reached.
    """

    def __init__(self, place: Place, deadline: float) -> None:
        self._place, self._deadline = place, deadline
        self._store = self._open()

    def everybody(self, topic: str, mine: Any) -> dict[int, Any]:
        """What every rank has to say, by rank; the same on all that came before the deadline."""
        place = self._place
        self._store.set(f"{topic}/{place.rank}", json.dumps(mine))
        if place.rank == 0:
            came = [rank for rank in range(place.world_size) if self._comes(f"{topic}/{rank}")]
            said = {rank: self._store.get(f"{topic}/{rank}").decode() for rank in came}
            self._store.set(f"{topic}/all", json.dumps(said))
        elif not self._comes(f"{topic}/all", 5.0):
            raise RuntimeError(f"{place.node_of(0)} does not answer any more")
        said = json.loads(self._store.get(f"{topic}/all"))
        return {int(rank): json.loads(text) for rank, text in said.items()}

    def missing(self) -> list[Finding]:
        """The nodes that did not come."""
        place = self._place
        came = self.everybody("present", place.node)
        cure = (
            "look at the node (sinfo -R, dmesg), leave it out: cluster.extra_sbatch=[--exclude=...]"
        )
        return [
            failure(place.node_of(rank), "present", "did not come to the meeting", cure)
            for rank in range(place.world_size)
            if rank not in came
        ]

    def clock(self) -> Finding:
        """How far this node's clock is from that of rank 0."""
        place = self._place
        self.everybody("clock", None)  # all wait for the next key
        if place.rank == 0:
            self._store.set("clock/now", repr(time.time()))
        off = time.time() - float(self._store.get("clock/now"))
        if abs(off) < _SKEW_S:
            return ok(place.node, "clock", f"within {_SKEW_S:.0f} s of {place.node_of(0)}")
        cure = "start chrony or ntpd on the node; file times and timeouts depend on it"
        return warning(place.node, "clock", f"{off:+.1f} s against {place.node_of(0)}", cure)

    def shared_folder(self, folder: Path) -> list[Finding]:
        """Whether what one node writes is there on the others; every node writes and reads."""
        place = self._place
        token = secrets.token_hex(8)
        path = folder / f".doctor-{place.rank}-{token}"
        written = _attempt(lambda: path.write_text(token))
        tokens = self.everybody(f"wrote/{folder}", None if written else token)
        seen = [self._reads(folder, rank, token) for rank, token in tokens.items() if token]
        self.everybody(f"read/{folder}", None)
        path.unlink(missing_ok=True)
        cure = "must be one file system on all nodes (run.root, cluster.logs): see `df` there"
        if written:
            return [failure(place.node, "shared folder", f"{folder}: {written}", cure)]
        unseen = [name for name in seen if name is not None]
        told = f"{folder}: does not show what {', '.join(unseen)} wrote"
        if unseen:
            return [failure(place.node, "shared folder", told, cure)]
        return [ok(place.node, "shared folder", str(folder))]

    def reach(self, backend: str) -> Finding:
        """A sum over all ranks, with its speed."""
        place = self._place
        device = (
            torch.device("cuda", place.local_rank) if backend == "nccl" else torch.device("cpu")
        )
        store = dist.PrefixStore(backend, self._store)
        left = timedelta(seconds=max(1.0, self._deadline - time.monotonic()))
        failed = _attempt(lambda: self._sum(backend, store, left, device), RuntimeError)
        if failed is None:
            return ok(place.node, backend, f"a sum over {place.world_size} processes")
        names = "NCCL_SOCKET_IFNAME, NCCL_IB_HCA" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        cure = f"open the nodes' ports, or choose the network by cluster.environment ({names})"
        return failure(place.node, backend, failed, cure)

    def _open(self) -> dist.Store:
        # A store may try for more than twice its timeout: so a third of what is left, and again.
        while True:
            left = self._deadline - time.monotonic()
            try:
                return self._opened(timedelta(seconds=max(1.0, left / 3)))
            except RuntimeError:
                if left < _SHORTEST_S:
                    raise
            time.sleep(_PAUSE_S)

    def _opened(self, timeout: timedelta) -> dist.Store:
        place = self._place
        return dist.TCPStore(
            place.address,
            place.port,
            None,
            place.hosts_store,
            timeout=timeout,
            wait_for_workers=False,
        )

    def _sum(
        self, backend: str, store: dist.Store, timeout: timedelta, device: torch.device
    ) -> None:
        place = self._place
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
        try:
            ones = torch.ones(_BYTES // 4, device=device)
            dist.all_reduce(ones)
            if not bool((ones == place.world_size).all()):
                raise RuntimeError("the sum is wrong")
        finally:
            dist.destroy_process_group()

    def _comes(self, key: str, grace_s: float = 0.0) -> bool:
        while not self._store.check([key]):
            if time.monotonic() > self._deadline + grace_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _reads(self, folder: Path, rank: int, token: str) -> str | None:
        """The node of a rank whose file does not show; None if it does."""
        path = folder / f".doctor-{rank}-{token}"
        until = min(time.monotonic() + _SHOW_S, self._deadline)
        while True:
            if _attempt(lambda: _expect(path, token)) is None:
                return None
            if time.monotonic() > until:
                return self._place.node_of(rank)
            time.sleep(_POLL_S)


def as_data(findings: list[Finding]) -> list[dict[str, str]]:
    """Findings as they go through the store."""
    return [asdict(finding) for finding in findings]


def _expect(path: Path, token: str) -> None:
    if path.read_text() != token:
        raise OSError("holds something else")


def _attempt(work: Callable[[], object], kind: type[Exception] = OSError) -> str | None:
    """None, or the first line of what went wrong."""
    try:
        work()
    except kind as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
