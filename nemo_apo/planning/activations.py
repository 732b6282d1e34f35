"""Bytes that a layer keeps of a micro-batch between its forward and its backward pass.

With b bytes per number, T tokens of the micro-batch on this context rank, S tokens in a sequence, t
tensor ranks, s = t under sequence parallelism and 1 otherwise; h, f, a, g, d as in ``shapes``,
q = a d and k = g d:

                fused layers                            local layers
    norms       4 b T h / s                             (6 b h + 8) T / s
    q/k norms   b T (q + k) / t                         (3 b (q + k) + 4 (a + g)) T / t
    rotation                                            4 b T d
    attention   (b (q + 2 k) + 4 a) T / t               b q (T + 2 T c) / t
    scores                                              (4 or 4 + b) a T S / t + S S / c
    output      b T q / t                               the same
    SwiGLU      3 b T f / t                             5 b T f / t

Fused layers are those of Transformer Engine: a norm keeps input and output, attention what it reads
and a float32 log-sum-exp, the SwiGLU gate and up (together 2 f) and their product. Local layers are
megatron-core's in plain torch: norms keep the normalized input too, keys and values are repeated
for every query head (over all c context ranks where they are gathered), the softmax is kept in
float32 and once more in bfloat16, the mask S S / c comes with c > 1, and the SwiGLU keeps two more
of its parts. Of the 3 q one goes where a rank has a single key/value head. With
recompute=selective attention keeps its inputs only; with recompute=full a layer keeps its own,
b T h / s.

The counting follows Korthikanti et al., arXiv 2205.05198, which does it for layers of another
shape; the terms are ours. Those of the local layers are what the layers save in float32 on a CPU (a
test holds it); in bfloat16 their norms may keep float32 numbers. Those of the fused layers are
unchecked.
"""

from nemo_apo.planning.layout import Layout
from nemo_apo.planning.settings import Question
from nemo_apo.planning.shapes import Shapes

FLOAT = 4


def local_tokens(question: Question, layout: Layout) -> int:
    """Tokens of a micro-batch on one context rank."""
    workload = question.workload
    return workload.micro_batch_size * workload.sequence_length // layout.context


def residual(question: Question, shapes: Shapes, layout: Layout) -> int:
    """One tensor of hidden states between the layers."""
    numbers = local_tokens(question, layout) * shapes.hidden
    return question.number_bytes * split(numbers, layout.residual_split)


def layer_activations(question: Question, shapes: Shapes, layout: Layout) -> int:
    """What one layer keeps of one micro-batch."""
    if question.parallel.recompute == "full":
        return residual(question, shapes, layout)
    return whole_layer(question, shapes, layout)


def whole_layer(question: Question, shapes: Shapes, layout: Layout) -> int:
    """What a layer holds while nothing but, perhaps, its attention is computed again."""
    number, tokens = question.number_bytes, local_tokens(question, layout)
    local = question.workload.has_local_layers
    norms = (6 if local else 4) * residual(question, shapes, layout)
    if local:
        norms += split(2 * FLOAT * tokens, layout.residual_split)
    widths = (5 if local else 3) * shapes.feed_forward + shapes.query_width
    kept = norms + number * split(tokens * widths, layout.tensor)
    kept += _query_key_norms(question, shapes, layout)
    if question.parallel.recompute == "selective":
        return kept + _attention_inputs(question, shapes, layout)
    return kept + attention_core(question, shapes, layout)


def attention_core(question: Question, shapes: Shapes, layout: Layout) -> int:
    """What attention itself keeps: its inputs as it uses them, and its scores."""
    number, tokens = question.number_bytes, local_tokens(question, layout)
    workload = question.workload
    if not workload.has_local_layers:
        sums = FLOAT * split(tokens * shapes.heads, layout.tensor)
        return _attention_inputs(question, shapes, layout) + sums
    inputs = number * split(shapes.query_width * tokens * (1 + 2 * layout.context), layout.tensor)
    per_score = FLOAT if number == FLOAT else FLOAT + number
    scores = tokens * workload.sequence_length * shapes.heads
    # One causal mask serves all layers, unless each makes its own from gathered positions.
    length = workload.sequence_length
    mask = length // layout.context * length if layout.context > 1 else 0
    return inputs + per_score * split(scores, layout.tensor) + mask


def _attention_inputs(question: Question, shapes: Shapes, layout: Layout) -> int:
    number, tokens = question.number_bytes, local_tokens(question, layout)
    # The norms of local layers keep the values already: these share their memory with what the
    # norms read.
    values = 1 if question.workload.has_local_layers and shapes.query_key_norms else 2
    width = shapes.query_width + values * shapes.key_width
    return number * split(tokens * width, layout.tensor)


def _query_key_norms(question: Question, shapes: Shapes, layout: Layout) -> int:
    """Before attention: norms of queries and keys, and what their rotation keeps."""
    number, tokens = question.number_bytes, local_tokens(question, layout)
    if not question.workload.has_local_layers:
        width = shapes.query_width + shapes.key_width if shapes.query_key_norms else 0
        return number * split(tokens * width, layout.tensor)
    rotation = 4 * number * tokens * shapes.head_size
    if not shapes.query_key_norms:
        return rotation
    # The queries of a single group stand together as they come; those of several are copied out.
    copied = shapes.query_width if shapes.groups > layout.tensor else 0
    numbers = copied + 2 * shapes.query_width + 3 * shapes.key_width
    scales = FLOAT * (shapes.heads + shapes.groups)
    return rotation + split(tokens * (number * numbers + scales), layout.tensor)


def split(count: int, ranks: int) -> int:
    """Numbers on the fullest of the ranks."""
    return -(-count // ranks)
