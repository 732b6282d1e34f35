"""The random generators of a process, as plain JSON.

Training draws from none of them: prompts, samples and shuffles come from generators made anew
from seed and step. What a task or a library draws besides goes on where it stopped.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor


def read_random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators of Python, numpy, torch and megatron in this process."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "tracker": {name: _text(s) for name, s in get_cuda_rng_tracker().get_states().items()},
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of ``read_random_state``."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    tracker = {name: _tensor(text) for name, text in state["tracker"].items()}
    get_cuda_rng_tracker().set_states(tracker)
    if device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
