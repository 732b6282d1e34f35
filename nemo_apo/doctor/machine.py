"""The checks of one node, none of which needs another."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_apo.doctor.findings import Finding, failure, ok, warning
from nemo_apo.versions import versions_of

_GIB = 2**30
# A checkpoint of a model of a billion parameters with its optimizer takes about 17 GB.
_DISK_WARNING, _DISK_FAILURE = 50 * _GIB, 1 * _GIB
# A container's default of 64 MiB is too small for NCCL and for data loaders.
_SHM_WARNING = 1 * _GIB
# How long a file system may take to show a folder.
_LOOK_S = 15.0
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")
_DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "vllm")


@dataclass(frozen=True)
class Wanted:
    """What a node is to have.

    Attributes:
        gpus: GPUs of a node; 0 asks for none.
        shared: folders that all nodes must see.
        readable: files and folders that must be readable.
        tokens: names of environment variables that must be set.
    """

    gpus: int = 0
    shared: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    tokens: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Versions that must be the same on every node."""
    return versions_of(_DISTRIBUTIONS)


def check_machine(
    node: str, wanted: Wanted, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """All findings of this node."""
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        ok(node, "versions", told),
        check_trainer(node),
        check_gpus(node, wanted.gpus),
        *(check_disk(node, path) for path in (*wanted.shared, Path("/tmp"))),
        check_shared_memory(node, Path("/dev/shm")),
        *(check_readable(node, path) for path in wanted.readable),
        *check_tokens(node, wanted.tokens, environment),
    ]


def check_trainer(node: str) -> Finding:
    """Whether the trainer's own framework is there."""
    if "megatron-core" in versions():
        return ok(node, "trainer", "megatron-core is installed")
    cure = "pip install 'nemo_apo[trainer]', or name the right interpreter by cluster.python"
    return failure(node, "trainer", "megatron-core is not installed", cure)


def check_gpus(node: str, wanted: int) -> Finding:
    """Whether torch sees as many GPUs as the job has."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < wanted:
        built = torch.version.cuda or "no CUDA"
        cure = (
            "ask Slurm for them (cluster.gpus_per_node), install a torch with CUDA, see nvidia-smi"
        )
        return failure(node, "gpus", f"{count} of {wanted}; torch has {built}", cure)
    if count == 0:
        return ok(node, "gpus", "none, none asked for")
    return ok(node, "gpus", f"{count} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}")


def check_disk(node: str, path: Path) -> Finding:
    """Room where checkpoints and temporary files go."""
    usage = _within(_LOOK_S, lambda: shutil.disk_usage(_existing(path)))
    if isinstance(usage, Exception):
        return failure(
            node, "disk", f"{path}: {usage}", "mount it on this node, or look at its server"
        )
    told = f"{path}: {usage.free / _GIB:.1f} GiB free"
    if usage.free < _DISK_FAILURE:
        return failure(node, "disk", told, "free some, or write elsewhere (run.root, TMPDIR)")
    if usage.free < _DISK_WARNING:
        return warning(node, "disk", told, "checkpoints need more; run.keep_last=2 keeps few")
    return ok(node, "disk", f"{path}: more than {_DISK_WARNING // _GIB} GiB free")


def check_shared_memory(node: str, path: Path) -> Finding:
    """Room for what processes of one node share."""
    usage = _within(_LOOK_S, lambda: shutil.disk_usage(path))
    cure = "give the container more (--shm-size, --ipc=host)"
    if isinstance(usage, Exception):
        return warning(node, str(path), str(usage), cure)
    if usage.free < _SHM_WARNING:
        return warning(node, str(path), f"{usage.free / 2**20:.0f} MiB free", cure)
    return ok(node, str(path), f"more than {_SHM_WARNING // _GIB} GiB free")


def check_readable(node: str, path: Path) -> Finding:
    """Whether a mount or a file can be read."""
    seen = _within(_LOOK_S, lambda: _read_a_little(path))
    if isinstance(seen, Exception):
        cure = "check cluster.mounts and the rights on the node; it must be there on every node"
        return failure(node, "readable", f"{path}: {seen}", cure)
    return ok(node, "readable", str(path))


def check_tokens(
    node: str, wanted: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Whether tokens are set; their values are never shown."""
    for name in dict.fromkeys((*wanted, *TOKENS)):
        if environment.get(name):
            yield ok(node, "token", f"{name} is set")
        elif name in wanted:
            cure = f"write {name}=... into the file that cluster.env_file names"
            yield failure(node, "token", f"{name} is not set", cure)
        else:
            yield ok(node, "token", f"{name} is not set, nothing needs it")


def _existing(path: Path) -> Path:
    """The path, or the nearest parent that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _read_a_little(path: Path) -> None:
    if path.is_dir():
        next(path.iterdir(), None)
    else:
        with path.open("rb") as file:
            file.read(1)


def _within(seconds: float, look: Callable[[], object]) -> object:
    """The result, or the exception; a file system that hangs counts as one.

    The thread that hangs stays behind: nothing ends a system call that waits for a dead server.
    """
    found: list[object] = []

    def work() -> None:
        try:
            found.append(look())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else TimeoutError(f"no answer for {seconds:.0f} s")
