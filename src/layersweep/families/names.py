"""Under which names files hold a decoder's weights: one table per family, most of it shared."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape, Role, Shape, layer_blocks

Spellings = tuple[str, ...]
LAYERS = "model.layers."
IGNORED_SUFFIX = ".rotary_emb.inv_freq"  # a buffer that old releases saved; computed from config


@dataclass(frozen=True)
class Wanted:
    """A weight that the model needs: `bases` are the names under which files may hold it."""

    name: str
    bases: Spellings
    shape: Shape


@dataclass(frozen=True)
class Part:
    """A weight that is rows [first, first + rows) of a fused tensor."""

    name: str
    shape: Shape
    first: int
    rows: int


@dataclass(frozen=True)
class Fused:
    """Several weights in one tensor, whose dimensions but the last are taken flat as rows.
    `transposed`: each part is stored so."""

    bases: Spellings
    shape: Shape
    parts: tuple[Part, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Whole:
    """A tensor that holds weights of a block one after the other; of all experts of a layer, if
    they are an expert's."""

    role: Role
    keys: tuple[str, ...]
    spellings: Spellings
    transposed: bool = False


@dataclass(frozen=True)
class Names:
    """`spellings`: canonical name without layer and expert number -> the names that files have for
    it, after "model.layers.N." if it is a layer's. `wholes`: tensors that may take their place."""

    spellings: Mapping[str, Spellings]
    wholes: tuple[Whole, ...] = ()

    def with_(self, spellings: Mapping[str, Spellings], *wholes: Whole) -> Names:
        """These names with others for some weights, and `wholes` in place of these."""
        return Names({**self.spellings, **spellings}, wholes or self.wholes)

    def ignores(self, name: str) -> bool:
        """Whether a file may hold this tensor for others."""
        return name.endswith(IGNORED_SUFFIX)

    def outside(self, block: BlockShape, there: Mapping[str, object]) -> Iterator[Wanted]:
        """The weights of the embedding or of the head."""
        return self.block(block)

    def block(self, block: BlockShape, without: Container[str] = ()) -> Iterator[Wanted]:
        """The weights of a block, but for keys that other tensors hold."""
        for key, shape in block.weights.items():
            if key not in without:
                yield Wanted(block.canonical(key), self.bases(block, key), shape)

    def layer(self, decoder: Decoder, index: int, there: Mapping[str, object]) -> Wants:
        """What the files must hold of a layer, as single or as fused tensors: whichever of them is
        `there`."""
        found = list(layer_blocks(decoder, index))
        fused: list[Fused] = []
        taken: set[tuple[Role, str]] = set()
        for whole in self.wholes:
            bases = _bases(whole, index)
            members = [block for block in found if block.role == whole.role]
            keys_there = members and all(key in members[0].weights for key in whole.keys)
            if keys_there and (whole.role, whole.keys[0]) not in taken and there.keys() & bases:
                fused.append(_fused(whole, members, bases))
                taken |= {(whole.role, key) for key in whole.keys}
        single = [
            wanted
            for block in found
            for wanted in self.block(block, [key for role, key in taken if role == block.role])
        ]
        return Wants(single, fused)

    def has_fused_experts(self, index: int, there: Container[str]) -> bool:
        """Whether a tensor of several experts of this layer is `there`."""
        wholes = (whole for whole in self.wholes if whole.role == "expert")
        return any(base in there for whole in wholes for base in _bases(whole, index))

    def bases(self, block: BlockShape, key: str) -> Spellings:
        """The names that files have for a weight of a block; the first is the published one."""
        if block.layer is None:
            return self.spellings[key]
        folder = {"attention": "", "expert": "experts."}.get(block.role, f"{block.role}.")
        spelled = self.spellings[f"{folder}{key}"]
        return tuple(
            f"{LAYERS}{block.layer}.{name.format(expert=block.expert)}" for name in spelled
        )


@dataclass(frozen=True)
class Wants:
    single: list[Wanted]
    fused: list[Fused]


def _bases(whole: Whole, index: int) -> Spellings:
    return tuple(f"{LAYERS}{index}.{name}" for name in whole.spellings)


def _fused(whole: Whole, members: list[BlockShape], bases: Spellings) -> Fused:
    """[rows, columns] of one block; [experts, rows, columns] of all experts, or [experts, numbers]
    of their vectors."""
    parts: list[Part] = []
    rows = 0
    for block in members:
        for key in whole.keys:
            shape = block.weights[key]
            # transposed, or a vector as one row of all experts' vectors
            own = shape[-1] if whole.transposed else 1 if len(shape) == 1 else shape[0]
            parts.append(Part(block.canonical(key), shape, rows, own))
            rows += own
    first = members[0].weights[whole.keys[0]]
    columns = first[0] if whole.transposed or len(first) == 1 else first[1]
    many = members[0].role == "expert"
    stored: Shape = (len(members), rows // len(members), columns) if many else (rows, columns)
    if len(first) == 1:  # a vector of each expert
        stored = (len(members), columns)
    return Fused(bases, stored, tuple(parts), whole.transposed)


MOE_FOLDERS = ("mlp", "block_sparse_moe")


def _weights(*names: str) -> Spellings:
    return tuple(f"{name}.weight" for name in names)


LLAMA = Names(
    {
        "embed": ("model.embed_tokens.weight",),
        "norm": ("model.norm.weight",),
        "lm_head": ("lm_head.weight",),
        "attention_norm": _weights("input_layernorm"),
        "feed_norm": _weights("post_attention_layernorm"),
        **{key: _weights(f"self_attn.{key}") for key in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{f"{key}_bias": (f"self_attn.{key}_proj.bias",) for key in "qkvo"},
        "q_norm": _weights("self_attn.q_norm"),
        "k_norm": _weights("self_attn.k_norm"),
        "sinks": ("self_attn.sinks",),
        **{f"mlp.{key}": _weights(f"mlp.{key}") for key in ("gate_proj", "up_proj", "down_proj")},
        **{f"mlp.{key}_bias": (f"mlp.{key}_proj.bias",) for key in ("gate", "up", "down")},
        "router": _weights("mlp.gate"),
        "router_correction": ("mlp.gate.e_score_correction_bias",),
        **{
            f"experts.{key}": _weights(f"mlp.experts.{{expert}}.{key}")
            for key in ("gate_proj", "up_proj", "down_proj")
        },
        **{
            f"shared.{key}": _weights(f"mlp.shared_experts.{key}", f"mlp.shared_expert.{key}")
            for key in ("gate_proj", "up_proj", "down_proj")
        },
        "shared.gate": _weights("mlp.shared_expert_gate"),
    },
    (
        # as transformers 5 holds experts in memory, and writes some of them
        Whole("expert", ("gate_proj", "up_proj"), ("mlp.experts.gate_up_proj",)),
        Whole("expert", ("down_proj",), ("mlp.experts.down_proj",)),
    ),
)
