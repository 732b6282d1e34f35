"""The highest memory that some work needs above what was in use before it.

On a GPU that is what torch's allocator counts. On a CPU it is the high-water mark of resident
memory that Linux keeps for every process and lets it reset: nothing is sampled, nothing slows the
work down, and the scratch memory of the libraries that multiply matrices counts, which a hook on
torch's tensors would not see.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Written to clear_refs, resets the high-water mark and nothing else.
_RESET_PEAK = "5"


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Peak of the work in MiB; None on a CPU whose system does not tell."""
    gc.collect()
    return _peak_on_gpu(work) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_gpu(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_on_cpu(work: Callable[[], object]) -> float | None:
    _return_free_memory()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    before = _status_mib("VmRSS")
    work()
    return max(0.0, _status_mib("VmHWM") - before)


def _return_free_memory() -> None:
    """Hand freed blocks back to the system, or the work would take them without being seen."""
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status_mib(key: str) -> float:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    raise KeyError(key)
