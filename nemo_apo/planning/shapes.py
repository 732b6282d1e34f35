"""The sizes of a dense decoder and its exact parameter counts.

With hidden size h, feed-forward size f, a query heads and g key/value heads of size d each, L
layers and V vocabulary rows:

    layer   h (a + 2 g) d  +  a d h  +  3 h f  +  2 h  +  2 d       qkv, output, SwiGLU, norms
            +  (a + 2 g) d                                          biases of qkv (Qwen2.5)
    model   L layers  +  V h  (twice unless tied)  +  h             embeddings, final norm

The 2 d are the norms of query and key (Qwen3). Nothing else has a bias.
"""

from dataclasses import dataclass

from nemo_apo.config import ModelConfig, padded_vocab_size


@dataclass(frozen=True)
class Shapes:
    """Sizes; the letters are those of the module's formulas.

    Attributes:
        name: a label.
        layers, hidden, feed_forward, heads, groups, head_size: L, h, f, a, g, d.
        vocabulary: V, padding included.
        tied: one matrix is both embedding and output layer.
        query_key_norms: queries and keys are normalized.
        qkv_bias: queries, keys and values have a bias.
    """

    name: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    tied: bool
    query_key_norms: bool
    qkv_bias: bool = False

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> "Shapes":
        """The shapes of a configured model with a vocabulary, which is padded as configured."""
        return cls(
            name=model.name,
            layers=model.num_layers,
            hidden=model.hidden_size,
            feed_forward=model.ffn_hidden_size,
            heads=model.num_attention_heads,
            groups=model.num_query_groups,
            head_size=model.kv_channels,
            vocabulary=padded_vocab_size(vocab_size, model),
            tied=model.tied_embeddings,
            query_key_norms=model.qk_layernorm,
            qkv_bias=model.add_qkv_bias,
        )

    @property
    def query_width(self) -> int:
        """Numbers in the queries of a token."""
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        """Numbers in the keys of a token; in the values as many."""
        return self.groups * self.head_size

    @property
    def layer_divided(self) -> int:
        """Parameters of a layer that tensor parallelism divides."""
        attention = self.hidden * (2 * self.query_width + 2 * self.key_width)
        biases = self.query_width + 2 * self.key_width if self.qkv_bias else 0
        return attention + biases + 3 * self.hidden * self.feed_forward

    @property
    def layer_norms(self) -> int:
        """Parameters of a layer that every tensor rank holds."""
        return 2 * self.hidden + (2 * self.head_size if self.query_key_norms else 0)

    @property
    def embedding(self) -> int:
        """Parameters of an embedding, or of an output layer."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model, each counted once."""
        ends = self.embedding * (1 if self.tied else 2) + self.hidden
        return self.layers * (self.layer_divided + self.layer_norms) + ends
