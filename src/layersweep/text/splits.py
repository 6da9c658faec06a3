"""How byte-level BPE splits a text before it merges, by llama.cpp's names (`tokenizer.ggml.pre`).

Each is (normalizer, pre-tokenizer) as the tokenizer.json of the family has them.
"""

from __future__ import annotations

from typing import Any

Part = dict[str, Any]

_BYTES: Part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT_4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> Part:
    """Cut out what each pattern finds, one after the other; then bytes as characters."""
    cuts = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*cuts, _BYTES | {"use_regex": False}]}


_GPT2: Part = _BYTES | {"use_regex": True}
_DIGITS: Part = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
_COMPOSED: Part = {"type": "NFC"}
_LLAMA3 = _split(rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}")
_QWEN2 = _split(rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_REST}")

SPLITS: dict[str, tuple[Part | None, Part]] = {
    "gpt-2": (None, _GPT2),
    "smollm": (None, _DIGITS),
    "starcoder": (None, _DIGITS),
    "refact": (None, _DIGITS),
    "command-r": (None, _DIGITS),
    "llama-bpe": (None, _LLAMA3),
    "llama3": (None, _LLAMA3),
    "llama-v3": (None, _LLAMA3),
    "qwen2": (_COMPOSED, _QWEN2),
    "gpt-4o": (None, _split(_GPT_4O)),
    "deepseek-v3": (
        None,
        _split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
    ),
}
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})  # a token that is a word is taken
BEGIN_WITH_BOS = WHOLE_WORDS  # where the file does not say
