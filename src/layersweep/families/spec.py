"""What a decoder computes, as data: frozen, without torch, read from config.json by a family.

    Decoder -> Layer per layer -> Attention (or Latent attention), Feed (dense, or routed experts)

Programs, plans and checkpoints read these; none of them asks which family a model belongs to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from layersweep.families.generic.parts import GenericParts

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "swiglu_clamped"]
Score = Literal["softmax", "softmax_topk", "sigmoid"]
GroupScore = Literal["max", "top2"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first `dim` coordinates of a head (Su et al., 2021).

    `interleaved`: coordinates 2i and 2i + 1 are a pair, else i and i + dim / 2. `turning`: share
    of the pairs that turn, of kind "proportional". The other fields are those of transformers'
    `rope_parameters`, where `kind` uses them.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_length: int = 0  # original_max_position_embeddings; dynamic: max_position_embeddings
    turning: float = 1.0  # partial_rotary_factor of a proportional one
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Of the whole sequence, see model/rope.py."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm. `offset` is added to the stored weight (Gemma: 1); with an offset
    the product is made in float32 and rounded once."""

    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434).

    Keys without position and values are products of one latent of `kv_rank` numbers per token;
    `rope_dim` more numbers are a key that all heads share. `query_rank` None: queries are
    projected at once.
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    query_rank: int | None = None


@dataclass(frozen=True)
class Attention:
    """Causal attention of one layer.

    `window`: the newest tokens that a query sees, itself included; None for all. `scale` of the
    scores; `softcap` c: scores become c tanh(scores / c); `sinks`: a learned score per head that
    takes part in the softmax and has no value. `qk_norm`: of each head, or of all heads at once.
    `rope` None: no positions. `value_dim`: of a value head. `bias`: of q, k, v; `out_bias`: of o.
    `norm`: of q, k and latents, the decoder's own by default. `clip`: q, k and v are kept within
    plus and minus it, after their norms.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: Literal["head", "all"] | None = None
    bias: bool = False
    out_bias: bool = False
    latent: Latent | None = None
    norm: Norm | None = None
    clip: float | None = None

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.num_kv_heads * self.value_dim

    @property
    def out_width(self) -> int:
        """What the output projection reads."""
        return self.num_heads * self.value_dim

    @property
    def read_widths(self) -> tuple[int, int]:
        """Numbers of a token's keys and values as attention reads them."""
        if self.latent:
            return self.query_width, self.out_width
        return self.key_width, self.value_width

    @property
    def stream_width(self) -> int:
        """Numbers that the cache holds of a token."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope_dim
        return self.key_width + self.value_width


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to, and with which weights.

    `score`: softmax over all experts, sigmoid of each, or softmax over the `top_k` logits alone.
    `bias`: of the logits; `correction`: added where experts are chosen, not to their weights.
    With `groups` > 1 only experts of the best `top_groups` groups can be chosen, a group judged
    by its best expert or by the sum of its best two. `normalize`: the weights of a token are
    divided by their sum; `scale` multiplies them afterwards. `float32`: logits are computed so,
    whatever the layer is computed in.
    """

    top_k: int
    score: Score = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    float32: bool = False


@dataclass(frozen=True)
class Feed:
    """The second half of a layer: one dense MLP, or routed experts with or without a shared one.

    An MLP is down(act(gate x) * up x), `inner` wide. `interleaved`: gate and up are the even and
    the odd rows of one matrix. `limit`: of swiglu_clamped (gpt_oss). `shared_inner`: width of an
    expert that all tokens go through, 0 for none.
    """

    inner: int
    act: Activation = "silu"
    bias: bool = False
    interleaved: bool = False
    limit: float = 0.0
    experts: int = 0
    router: Router | None = None
    shared_inner: int = 0
    shared_gate: bool = False

    @property
    def routed(self) -> bool:
        return self.router is not None


@dataclass(frozen=True)
class Layer:
    """Attention, then feed: x += out_norm(half(in_norm(x))) for both, where a norm that is None
    is left out. `residual`: multiplies what a half adds."""

    attention: Attention
    feed: Feed
    attention_norm: Norm | None
    feed_norm: Norm | None
    attention_out_norm: Norm | None = None
    feed_out_norm: Norm | None = None
    residual: float = 1.0

    @property
    def projects_keys(self) -> bool:
        """Keys, before RoPE, are a projection of normed rows and no more: what weights say of
        their directions is all that there is."""
        one, norm = self.attention, self.attention_norm
        more = one.latent or one.qk_norm or one.bias or one.clip
        return not more and norm is not None and not norm.offset


@dataclass(frozen=True)
class Decoder:
    """A decoder-only language model.

    `embedding_scale` multiplies embeddings, `logit_scale` logits, before `logit_softcap`.
    `synthetic`: the weights were never trained. `draft_layers`: layers for multi-token prediction
    that files may hold behind the last one; they are not run. `generic`: what is known of the
    modules of transformers that compute it; None where a program of this package does.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    synthetic: bool = False
    draft_layers: int = 0
    generic: GenericParts | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def distinct_layers(self) -> dict[Layer, int]:
        """Layers that compute alike, and how many there are of each."""
        return dict(Counter(self.layers))

    @cached_property
    def query_width(self) -> int:
        """Numbers of a token's queries, or of what its attention returns, in the widest layer."""
        each = (layer.attention for layer in self.distinct_layers)
        return max(max(one.query_width, one.out_width) for one in each)

    @cached_property
    def widest_inner(self) -> int:
        """Width of the widest MLP."""
        return max(max(one.feed.inner, one.feed.shared_inner) for one in self.distinct_layers)

    @cached_property
    def read_width(self) -> int:
        """Numbers of a token's keys and values as attention reads them, in the widest layer."""
        each = (layer.attention for layer in self.distinct_layers)
        return max(sum(one.read_widths) for one in each)

    @cached_property
    def num_experts(self) -> int:
        """Most routed experts of a layer; 0 for a dense model."""
        return max(layer.feed.experts for layer in self.distinct_layers)

    @cached_property
    def experts_per_token(self) -> int:
        """Of the layers that have experts; 0 for a dense model."""
        routers = (layer.feed.router for layer in self.distinct_layers)
        return max((router.top_k for router in routers if router), default=0)

    @cached_property
    def routes_in_float32(self) -> bool:
        routers = (layer.feed.router for layer in self.distinct_layers)
        return any(router.float32 for router in routers if router)


def describe_decoder(decoder: Decoder) -> str:
    """ "MixtralForCausalLM, 32 layers, 8 experts (2 per token)"."""
    experts = ""
    if decoder.num_experts:
        experts = f", {decoder.num_experts} experts ({decoder.experts_per_token} per token)"
    return f"{decoder.architecture}, {decoder.num_hidden_layers} layers{experts}"
