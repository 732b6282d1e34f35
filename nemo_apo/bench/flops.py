"""Operations that a model needs by its shape, whatever the program does in fact."""

from nemo_apo.config import ModelConfig


def model_flops(model: ModelConfig, vocab: int, length: int) -> float:
    """Multiplications and additions per token of forward and backward, sequences of ``length``.

    A matrix of n numbers takes 2n forward and 4n backward. Attention is counted as causal: a token
    looks at half of the sequence on average. The embedding is a look-up and takes nothing.
    """
    heads = model.num_attention_heads * model.kv_channels
    keys_and_values = 2 * model.num_query_groups * model.kv_channels
    layer = model.hidden_size * (2 * heads + keys_and_values + 3 * model.ffn_hidden_size)
    weights = model.num_layers * layer + model.hidden_size * vocab
    # Scores and weighted values: 2 x 2 x heads x length / 2 forward, twice that backward.
    attention = model.num_layers * 6 * heads * length
    return 6.0 * weights + attention
