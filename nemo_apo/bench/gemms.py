"""The matrix products that log-probs and their gradients cannot do without, and nothing else.

For each chunk of the vocabulary: logits, logits once more, dL/dweight and dL/dhidden, 2THV
multiplications and additions each, 8THV in all.
"""

import torch

from nemo_apo.bench.example import Example
from nemo_apo.parallel.logprobs import CHUNK


@torch.no_grad()
def multiply(example: Example) -> None:
    """The four products of every chunk, in the dtype of the inputs, into buffers used again."""
    hidden_TH, weight_VH = example.inputs
    buffer = hidden_TH.new_empty(example.tokens * min(CHUNK, example.vocab))
    grad_weight_VH = torch.empty_like(weight_VH)
    grad_hidden_TH = torch.empty_like(hidden_TH)
    for start in range(0, example.vocab, CHUNK):
        rows_cH = weight_VH[start : start + CHUNK]
        width = rows_cH.shape[0]
        logits_Tc = buffer[: example.tokens * width].view(example.tokens, width)
        torch.mm(hidden_TH, rows_cH.t(), out=logits_Tc)
        torch.mm(hidden_TH, rows_cH.t(), out=logits_Tc)
        torch.mm(logits_Tc.t(), hidden_TH, out=grad_weight_VH[start : start + CHUNK])
        torch.mm(logits_Tc, rows_cH, out=grad_hidden_TH)
