"""The shape of a causal language model: what its weights, its adapters and a step of its training need follows from it.

Knows no files and no torch. The catalogue's shapes come from published configurations, others are read from the headers of their weights.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer that stands in each layer of the model, by the last part of its name."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Its weights, a bias left out."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of `layer_count` equal layers. `linears` are those of one layer, the head left out."""

    parameter_count: int
    layer_count: int
    hidden_size: int
    intermediate_size: int
    head_count: int
    key_head_count: int
    head_size: int
    vocabulary_size: int
    tied_embeddings: bool
    linears: tuple[Linear, ...]

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers, the head left out: what QLoRA holds in 4 bits."""
        return self.layer_count * sum(linear.weights for linear in self.linears)

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied with, the head among them."""
        return self.linear_weights + self.vocabulary_size * self.hidden_size

    def select(self, target_modules: tuple[str, ...]) -> tuple[Linear, ...]:
        """Give the linear layers that these names mean; `all-linear` means all."""
        if target_modules == ("all-linear",):
            return self.linears
        return tuple(linear for linear in self.linears if linear.name in target_modules)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The numbers of a published configuration that a layout turns into a shape."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False

    @property
    def query_width(self) -> int:
        """Numbers of all query heads together."""
        return self.heads * (self.head_size or self.hidden // self.heads)

    @property
    def key_width(self) -> int:
        """Numbers of all key heads together."""
        return self.key_heads * (self.head_size or self.hidden // self.heads)

    def shape(self, linears: tuple[Linear, ...], other_weights: int, parameter_count: int | None = None) -> ModelShape:
        """Make the shape; `other_weights` are a layer's biases and norms. The count follows where it is not given."""
        head = 0 if self.tied else self.vocabulary * self.hidden
        per_layer = sum(linear.weights for linear in linears) + other_weights
        counted = self.vocabulary * self.hidden + head + self.layers * per_layer + self.hidden
        return ModelShape(
            parameter_count=counted if parameter_count is None else parameter_count,
            layer_count=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            head_count=self.heads,
            key_head_count=self.key_heads,
            head_size=self.head_size or self.hidden // self.heads,
            vocabulary_size=self.vocabulary,
            tied_embeddings=self.tied,
            linears=linears,
        )


def _attention(of: Dimensions) -> tuple[Linear, ...]:
    return (
        Linear("q_proj", of.hidden, of.query_width),
        Linear("k_proj", of.hidden, of.key_width),
        Linear("v_proj", of.hidden, of.key_width),
        Linear("o_proj", of.query_width, of.hidden),
    )


def _gated_mlp(of: Dimensions) -> tuple[Linear, ...]:
    return (
        Linear("gate_proj", of.hidden, of.intermediate),
        Linear("up_proj", of.hidden, of.intermediate),
        Linear("down_proj", of.intermediate, of.hidden),
    )


def shape_llama(of: Dimensions) -> ModelShape:
    """Llama and Mistral: two norms, no bias."""
    return of.shape(_attention(of) + _gated_mlp(of), 2 * of.hidden)


def shape_qwen2(of: Dimensions) -> ModelShape:
    """Qwen 2: Llama with biases on queries, keys and values."""
    return of.shape(_attention(of) + _gated_mlp(of), 2 * of.hidden + of.query_width + 2 * of.key_width)


def shape_qwen3(of: Dimensions) -> ModelShape:
    """Qwen 3: Llama with norms on query and key heads."""
    return of.shape(_attention(of) + _gated_mlp(of), 2 * of.hidden + 2 * of.head_size)


def shape_gemma2(of: Dimensions) -> ModelShape:
    """Gemma 2: Llama with four norms."""
    return of.shape(_attention(of) + _gated_mlp(of), 4 * of.hidden)


def shape_phi3(of: Dimensions) -> ModelShape:
    """Phi 3: Llama with joined projections."""
    linears = (
        Linear("qkv_proj", of.hidden, of.query_width + 2 * of.key_width),
        Linear("o_proj", of.query_width, of.hidden),
        Linear("gate_up_proj", of.hidden, 2 * of.intermediate),
        Linear("down_proj", of.intermediate, of.hidden),
    )
    return of.shape(linears, 2 * of.hidden)


def shape_falcon(of: Dimensions) -> ModelShape:
    """Falcon: joined attention, a plain feed-forward, LayerNorms with bias (one per layer in 7B, two in 40B's new decoder)."""
    linears = (
        Linear("query_key_value", of.hidden, of.query_width + 2 * of.key_width),
        Linear("dense", of.query_width, of.hidden),
        Linear("dense_h_to_4h", of.hidden, of.intermediate),
        Linear("dense_4h_to_h", of.intermediate, of.hidden),
    )
    norms = 1 if of.key_heads == 1 else 2
    layers = of.layers * (sum(linear.weights for linear in linears) + norms * 2 * of.hidden)
    return of.shape(linears, 0, of.vocabulary * of.hidden + layers + 2 * of.hidden)
