"""Which stored names a canonical weight may have, and which dense shape it must have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layersweep.checkpoint.config import ModelConfig

MOE_FOLDERS = ("block_sparse_moe", "mlp")
EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # a buffer that old releases saved; computed from config


@dataclass(frozen=True)
class Wanted:
    """A weight that the model needs: `bases` are the names under which files may hold it."""

    name: str
    bases: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Fused:
    """All experts of a layer in one 3-D tensor. `parts`: expert weight -> first row, rows."""

    layer: int
    bases: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int, int], ...]


def dense_weights(config: ModelConfig) -> Iterator[Wanted]:
    """Everything but the experts, in the order of the forward pass."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Wanted("embed", ("model.embed_tokens.weight",), (vocab, hidden))
    for layer in range(config.num_hidden_layers):
        yield from _layer_weights(config, layer)
    yield Wanted("norm", ("model.norm.weight",), (hidden,))
    yield Wanted("lm_head", ("lm_head.weight",), (vocab, hidden))


def _layer_weights(config: ModelConfig, layer: int) -> Iterator[Wanted]:
    stored, name = f"model.layers.{layer}", f"layers.{layer}"
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield Wanted(f"{name}.input_norm", (f"{stored}.input_layernorm.weight",), (hidden,))
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    for part, shape in shapes.items():
        yield Wanted(f"{name}.{part}", (f"{stored}.self_attn.{part}.weight",), shape)
    after = "post_attention_layernorm"
    yield Wanted(f"{name}.post_attention_norm", (f"{stored}.{after}.weight",), (hidden,))
    gates = tuple(f"{stored}.{folder}.gate.weight" for folder in MOE_FOLDERS)
    yield Wanted(f"{name}.router", gates, (config.num_local_experts, hidden))


def expert_weights(config: ModelConfig, layer: int) -> Iterator[Wanted]:
    """The experts of a layer, one by one: w1 and w3 [I, H], w2 [H, I]."""
    wide, narrow = config.intermediate_size, config.hidden_size
    for expert in range(config.num_local_experts):
        for part, alias in EXPERT_PARTS.items():
            bases = tuple(
                f"model.layers.{layer}.{folder}.experts.{expert}.{spelling}.weight"
                for folder in MOE_FOLDERS
                for spelling in (part, alias)
            )
            shape = (narrow, wide) if part == "w2" else (wide, narrow)
            yield Wanted(f"layers.{layer}.experts.{expert}.{part}", bases, shape)


def fused_experts(config: ModelConfig, layer: int) -> tuple[Fused, Fused]:
    """The experts of a layer as transformers 5 holds them: w1's rows, then w3's; w2 apart."""
    wide, narrow, experts = config.intermediate_size, config.hidden_size, config.num_local_experts

    def bases(tensor: str) -> tuple[str, ...]:
        names = (f"model.layers.{layer}.{folder}.experts.{tensor}" for folder in MOE_FOLDERS)
        return tuple(spelling for name in names for spelling in (name, f"{name}.weight"))

    up_shape, down_shape = (experts, 2 * wide, narrow), (experts, narrow, wide)
    up_parts = (("w1", 0, wide), ("w3", wide, wide))
    return (
        Fused(layer, bases("gate_up_proj"), up_shape, up_parts),
        Fused(layer, bases("down_proj"), down_shape, (("w2", 0, narrow),)),
    )
