"""A KV cache for any Hugging Face model that goes through one of our codecs.

    cache = cache_for(model, "K3V2")
    model.generate(**inputs, cache=cache)          # past_key_values=cache in older releases

Every read goes through the codec, the first included: transformers' own quantized cache returns
the original keys and values of its first call, so that a one-shot perplexity through it measures
nothing. Which layers keep a window, all tokens or a state is what transformers' DynamicCache makes
of the model's config; states stay exact.

What a cache holds depends on how many tokens it has, not on the pieces they came in (for means
that needs `@block`, which a bare name has). A query reads what is held once its whole piece is in:
of a prompt in one piece, early queries see tokens coded that were still in the window when a text
grows token by token.

Models hand their keys over after RoPE. For a codec it is undone and done again, by the model's own
tables and functions and the token's index in the cache. Under left padding that index is not the
position, which shifts all keys of a sequence alike and changes no score. A layer without RoPE that
`config.no_rope_layers` does not name is turned all the same: what is undone is done again, but its
codec does not see the keys as the projection made them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from layersweep.errors import InputError
from layersweep.families.registry import describe
from layersweep.integrations.transformers.rope import Rope
from layersweep.integrations.transformers.texts import SweptCache
from layersweep.kv.arms import Arm, parse
from layersweep.kv.basis import Basis, key_basis
from layersweep.kv.codec import wants_basis
from layersweep.kv.methods import FIRST_BLOCK
from layersweep.kv.size import KvSize
from layersweep.kv.store import KvStore
from layersweep.kv.stream import Rotation, Stream, keys_and_values, latent_streams
from layersweep.notebook import tell


def cache_for(model: Any, kv: str) -> Cache:
    """A cache for `model.generate(cache=...)` or `model(..., cache=...)` under the arm `kv`.

    Full and sliding-window attention and latents (MLA) go through the arm. Linear attention,
    convolutions and Mamba keep transformers' own state, exact; cache_size counts it apart.

    Keys are coded in the coordinates that follow from the layer's weights, as in a sweep. What
    @fit=1 takes from a sweep is not there: a note says so, and the arm is that of @fit=0.

    Raises InputError for an unknown arm, for a model without one rotary table in the usual place,
    and for layers that keep something else. What the arm's codec cannot take is refused with the
    first token.
    """
    arm = parse(kv, growing=True)
    if arm.fits:
        tell(
            f"note: {arm.name}: coded as keys and values come, as with fit=0: only sweeps fit them"
        )
    config = model.config.get_text_config() if hasattr(model, "config") else None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    rotary = [name for name, _ in decoder.named_children() if "rotary_emb" in name]
    if config is None or rotary != ["rotary_emb"]:
        raise InputError(
            f"{type(model).__name__}: found {', '.join(rotary) or 'no rotary_emb'}, needed one "
            "rotary_emb in its decoder to undo RoPE",
            hint="decoder models of transformers with one rotary module are supported",
        )
    theirs = DynamicCache(config=config).layers
    arm.check_model(len(theirs))
    kinds = getattr(config, "layer_types", None) or [None] * len(theirs)
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(theirs)
    bases = _bases(config, decoder) if arm.codec and wants_basis(arm.codec) else {}
    layers: list[Any] = []
    for index, layer in enumerate(theirs):
        if isinstance(layer, CacheLayerMixin):
            rope = Rope.of(decoder.rotary_emb, kinds[index]) if rotated[index] else None
            window = _window(layer, type(model).__name__)
            latent, place = _latent(config), (index, len(theirs))
            layer = CodedLayer(arm, rope, latent, window, place, bases.get(index))
        layers.append(layer)
    if not any(isinstance(layer, CodedLayer) for layer in layers):
        raise InputError(f"{type(model).__name__}: found no layer that keeps keys, needed one")
    return Cache(layers=layers)


def cache_size(cache: Cache) -> KvSize:
    """What all sequences in a cache take together, and their tokens: measured in one of
    `cache_for`, by arithmetic in one of a swept model."""
    if isinstance(cache, SweptCache):
        return cache.size
    coded = [layer for layer in cache.layers if isinstance(layer, CodedLayer)]
    stores = [layer.store for layer in coded if layer.store is not None]
    states = (part for layer in cache.layers for part in _state_tensors(layer))
    return KvSize(
        tokens=cache.get_seq_length() * coded[0].sequences,
        nbytes=sum(store.nbits(0) for store in stores) / 8,
        elements=sum(store.elements(0) for store in stores),
        state_bytes=sum(part.nbytes for part in states),
    )


def _bases(config: Any, decoder: Any) -> dict[int, Basis]:
    """Coordinates of keys by layer, where they follow from the weights of modules with the usual
    names."""
    described = describe(config.to_dict(), "config").decoder
    modules = getattr(decoder, "layers", ())
    if described is None or len(modules) != len(described.layers):
        return {}
    found = {}
    for index, (layer, module) in enumerate(zip(described.layers, modules, strict=True)):
        named = dict(module.named_parameters())
        names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight")
        if layer.projects_keys and named.keys() >= {*names}:
            q, k, norm = (named[name].detach().float() for name in names)
            found[index] = key_basis(q, k, norm, layer.attention.head_dim)
    return found


def _state_tensors(layer: Any) -> list[Tensor]:
    states = (getattr(layer, name, {}) for name in ("conv_states", "recurrent_states"))
    return [part for held in states for part in held.values() if part is not None]


def _window(layer: Any, model: str) -> int | None:
    """Of the layer that transformers would take: how many tokens it looks at, None for all."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise InputError(
        f"{model}: found a {type(layer).__name__} in its cache, needed full or sliding-window "
        "attention, or a state without keys",
        hint="run it with transformers' own cache",
    )


def _latent(config: Any) -> tuple[int, int] | None:
    """Sizes of the latent and of its rotary part, where a model has multi-head latent attention."""
    latent, rotary = (getattr(config, name, 0) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    return (latent, rotary) if latent and rotary else None


class CodedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values, or its latent, as an arm keeps them. Everything that is read has
    gone through the codec, the newest token included, except what `@sink`, `@window`, `@pb`,
    `@layers` and 16 bits keep exact.

    What attention reads of a coded stream stays beside it, so that a token which leaves nothing to
    be coded decodes nothing: under a bare arm that is 15 of 16. In a layer that drops tokens, each
    token decodes what the window holds.

    With a `window` W it holds what DynamicSlidingWindowLayer holds, the last W - 1 tokens, and
    returns these and the new ones.
    """

    is_compileable = False

    def __init__(
        self, arm: Arm, rope: Rotation | None, latent: tuple[int, int] | None,
        window: int | None, place: tuple[int, int], basis: Basis | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.arm, self.rope, self.latent = arm, rope, latent
        self.window, self.is_sliding = window, window is not None
        self.place, self.basis, self.sequences = place, basis, 0
        self.streams: tuple[Stream, Stream] | None = None
        self.store: KvStore | None = None
        self.seen: list[Tensor | None] = [None, None]  # what attention reads of each stream

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The layer's streams, from the first tokens that come."""
        (self.sequences, heads, _, dim), value_dim = key_states.shape, value_states.shape[3]
        if self.latent is None:
            streams = keys_and_values(heads, dim, self.window, value_dim)
        elif (heads, dim, value_dim) == (1, *self.latent):
            streams = latent_streams(*self.latent, self.window)
        else:
            raise InputError(
                f"KV codec cache: found keys [{heads}, {dim}] of a model with a latent of "
                f"{self.latent[0]} + {self.latent[1]}, needed the latent itself",
                hint="a later release of transformers caches it",
            )
        keys, values = (
            replace(stream, rope=False)
            if self.rope is None
            else replace(stream, rotation=self.rope if stream.rope else None)
            for stream in streams
        )
        self.streams = (replace(keys, basis=self.basis), values)
        self.store = KvStore.empty([(self.arm, self.streams)], *self.place, FIRST_BLOCK)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; all keys (rotated) and values that these may look at, as decoded from the
        codec."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None and self.streams is not None
        new, before = (key_states, value_states), self.store.arms[0]
        store = self.store.appended(new)
        keys, values = seen = [
            torch.cat((held, x), dim=2)
            if held is not None and stream.middle is old.middle
            else stream.decoded()
            for stream, old, held, x in zip(store.arms[0], before, self.seen, new, strict=True)
        ]
        first = self.streams[0].first_held(store.end)
        stays = first <= store.arms[0][0].first
        self.seen = [
            x if stays and stream.middle else None
            for stream, x in zip(store.arms[0], seen, strict=True)
        ]
        store = store.since(first)
        # exact tokens are views: a copy lets go of the others
        self.store = store.moved(torch.clone) if key_states.shape[2] > 1 else store
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(keys that will be there, offset of the first), for the attention mask."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self.store is None:
            return count, 0
        return self.store.tokens + count, self.store.end - self.store.tokens

    def get_seq_length(self) -> int:
        return 0 if self.store is None else self.store.end

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_max_cache_shape(self) -> int:
        """The same under the name that earlier releases of transformers 5 use."""
        return self.get_max_length()

    def reset(self) -> None:
        self.store, self.seen, self.is_initialized = None, [None, None], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError(
            "KV codec cache: found a beam search, needed greedy search or sampling",
            hint="num_beams=1",
        )

    @property
    def bits_per_element(self) -> float:
        """Measured, over the keys and values that are held."""
        assert self.store is not None
        return self.store.nbits(0) / self.store.elements(0)
