"""EXAONE 4.0 (LG AI Research, 2025, arXiv:2507.11407): windows have positions, layers that see
everything have none."""

from __future__ import annotations

from layersweep.families.family import Family
from layersweep.families.fields import Fields
from layersweep.families.parts import assemble, grouped, read_patterned_windows, read_sizes
from layersweep.families.spec import Decoder, Feed, Layer
from layersweep.families.tables.olmo import POST_NORM


def read(f: Fields) -> Decoder:
    sizes = read_sizes(f)
    windows = read_patterned_windows(f, sizes)
    rope, feed = f.rope(sizes.head_dim), Feed(f.count("intermediate_size"), f.activation())
    far = rope if f.get("sliding_window") is None else None
    layers = []
    for window in windows:
        own = rope if window else far
        attention = grouped(sizes, own, window=window, qk_norm="head")
        layers.append(Layer(attention, feed, None, None, sizes.norm, sizes.norm))
    return assemble(f, sizes, layers)


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    read,
    POST_NORM,
    {
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
)
