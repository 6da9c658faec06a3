"""TINY: a small config.json for each decoder, with everything that its family can do switched on.

A name is a model type, or `model_type:variant`. What is not said comes from `small.SMALL` and from
the type's own defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from families.dense import DENSE
from families.experts import EXPERTS
from families.hybrids import HYBRIDS
from families.small import Tiny

TINY: Mapping[str, Tiny] = {**DENSE, **EXPERTS, **HYBRIDS}

# What every run of the tests takes; the others are marked `slow`.
CORE = frozenset({
    *("llama", "llama:bias", "llama:tied", "llama:llama3", "llama:linear", "llama:yarn"),
    *("mistral", "qwen2", "qwen2:window", "qwen3", "olmo2", "olmo3", "phi3", "phi3:longrope"),
    *("gemma", "gemma2", "gemma3_text", "glm4", "granite", "cohere2", "starcoder2", "stablelm"),
    *("smollm3", "ernie4_5", "exaone4", "seed_oss", "nemotron", "arcee", "gpt_neox", "phi"),
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v2"),
    *("deepseek_v2:groups", "deepseek_v3", "granitemoe", "ernie4_5_moe", "minimax_m2"),
    *("glm4_moe_lite", "qwen3_next", "lfm2"),
})  # fmt: skip


# Refused, with these words.
REFUSED = {
    "axk2": "attention mask",
    "bloom": "position_ids",
    "deepseek_v32": "attention mask",
    "diffllama": "two attention calls",
    "doge": "attention mask",
    "falcon": "attention of its own",
    "falcon_mamba": "position_ids",
    "glm_moe_dsa": "attention mask",
    "gpt_neo": "attention of its own",
    "gpt_neox_japanese": "attention mask",
    "llama4_text": "counts row by row",
    "longcat_flash": "2 modules with attention",
    "mamba": "position_ids",
    "mamba2": "position_ids",
    "mpt": "position_ids",
    "openai-gpt": "no layer that attends",
    "xglm": "attention mask",
}

# A transformers of its own for each changed field takes seconds a family: one of each kind.
CHANGED = frozenset({
    *("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "cohere2"),
    *("mixtral", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3"),
})  # fmt: skip


def parameters(names: Iterable[str], core: frozenset[str] = CORE) -> list[object]:
    """Names for pytest.mark.parametrize but those of REFUSED, those beyond `core` marked."""
    return [
        name if name in core else pytest.param(name, marks=pytest.mark.slow)
        for name in names
        if name not in TINY or TINY[name].model_type not in REFUSED
    ]
