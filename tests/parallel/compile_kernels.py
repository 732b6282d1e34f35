"""``python -m tests.parallel.compile_kernels``: the Triton kernels for GPUs, without a GPU."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_apo.parallel import logprob_chunks_triton as kernels

CAPABILITIES = (80, 90)  # A100; H100 and H200


def code_size(kernel: Any, capability: int, pointers: dict[str, str], **constants: Any) -> int:
    """Bytes of machine code."""
    kinds = dict.fromkeys(kernel.arg_names, "i32") | pointers
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])


def compile_all(capability: int, dtype: str) -> None:
    sums = dict.fromkeys(["peak_T", "total_T", "moment_T", "target_T"], "*fp32")
    pointers = {"logits_Tc": f"*{dtype}", "columns_T": "*i64", **sums}
    sizes = [code_size(kernels._add_chunk, capability, pointers, SCALE=1.25, BLOCK=kernels._BLOCK)]
    slopes = dict.fromkeys(["lse_T", "constant_T", "linear_T", "at_target_T"], "*fp32")
    pointers = {"out_Tc": "*bf16", "logits_Tc": f"*{dtype}", "columns_T": "*i64", **slopes}
    for has_linear in (False, True):
        constants = {"SCALE": 1.0, "HAS_LINEAR": has_linear, "BLOCK": kernels._BLOCK}
        sizes.append(code_size(kernels._slope_of_chunk, capability, pointers, **constants))
    assert min(sizes) > 0
    print(f"sm_{capability} {dtype}: {len(sizes)} kernels")


if __name__ == "__main__":
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp32"):
            compile_all(capability, dtype)
