"""JSON from strangers, believed only as far as it is small, flat and says everything once."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

LARGEST_JSON = 64 * 2**20  # the index of 500,000 tensors, a tokenizer of 500,000 tokens
MOST_VALUES = 2**20  # the header of 100,000; a value of 3 bytes may take 300 in memory
TOKENIZER_VALUES = 2**21  # a tokenizer of 262,144 tokens has 1.9 million
DEEPEST = 32  # what is deeper cannot be compared, printed or freed without recursion


class UnusableJson(ValueError):
    """Its text is what was found: "no JSON (...)"."""


def parse_json(raw: bytes, most_values: int = MOST_VALUES) -> tuple[Any, list[str]]:
    """The value in `raw`, and the keys that one of its objects has twice.

    Raises UnusableJson for what is not UTF-8 or not JSON, too deep, larger than LARGEST_JSON or of
    more than `most_values` values.
    """
    if len(raw) > LARGEST_JSON:
        raise UnusableJson(f"{len(raw)} bytes of JSON, more than {LARGEST_JSON}")
    if sum(map(raw.count, (b",", b"[", b"{"))) > most_values:
        raise UnusableJson(f"JSON of more than {most_values} values")
    repeated: set[str] = set()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.update(key for key, count in counts.items() if count > 1)
        return entries

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise UnusableJson(f"JSON nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise UnusableJson(f"no JSON ({error})") from error
    _check_depth(value)
    return value, sorted(repeated)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        lists = (item for item in level if isinstance(item, list))
        dicts = (item.values() for item in level if isinstance(item, dict))
        level = [*chain.from_iterable(lists), *chain.from_iterable(dicts)]
    if level:
        raise UnusableJson(f"JSON nested deeper than {DEEPEST} levels")
