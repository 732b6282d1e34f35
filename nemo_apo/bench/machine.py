"""The machine and the versions that measured figures belong to."""

import os
import platform
from pathlib import Path

import torch

from nemo_apo.versions import versions_of

# Distributions whose version can change a figure.
_DISTRIBUTIONS = ("torch", "megatron-core", "triton", "liger-kernel", "trl")


def machine(device: str) -> dict[str, str | int | float]:
    """Processor, cores, memory and, where it is measured, the GPU."""
    described: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(_memory_gib(), 1),
        "device": device,
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["gpus"] = torch.cuda.device_count()
    return described


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that are installed."""
    return versions_of(_DISTRIBUTIONS)


def _processor() -> str:
    """Name of the processor and those of its instructions that matter to matrix products."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    name = fields.get("model name", platform.machine())
    return " ".join([name, *known])


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
