"""What lies beside the weights and is not used: adapters, other formats, code, stray shards."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from layersweep.checkpoint.shards import INDEX, SINGLE
from layersweep.problems import printable

ADAPTER = "adapter_config.json"
READ = frozenset({
    *("config.json", "card.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
})  # fmt: skip
# Where there is no tokenizer.json, transformers makes a tokenizer of these.
TOKENIZER_SOURCES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
FOR_PEOPLE = re.compile(
    r"\.|README|LICEN[CS]E|NOTICE|.*\.(md|pdf|png|jpe?g|gif|svg)$", re.IGNORECASE
)
MOST_SHOWN, LONGEST_SHOWN = 10, 60


def unused_files(names: Collection[str], shards: Collection[str]) -> tuple[str, ...]:
    """Names in a checkpoint's folder that nothing reads, without what is there for people."""
    used = READ | set(shards) | (set() if SINGLE in names else {INDEX})
    if "tokenizer.json" not in names:
        used |= {name for name in names if name.startswith(TOKENIZER_SOURCES)}
    return tuple(sorted(name for name in set(names) - used if not FOR_PEOPLE.match(name)))


def adapter_note(names: Collection[str]) -> Iterator[str]:
    """transformers with peft loads an adapter that lies in a model's folder by itself."""
    if ADAPTER in names:
        yield (
            f"{ADAPTER} is there and not applied: these are the weights without the adapter that "
            "transformers would load with peft"
        )


def shortened(names: Collection[str]) -> str:
    """One line: names that differ in their numbers, or lie in one folder, are one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = f"{name.split('/')[0]}/*" if "/" in name else re.sub(r"\d+", "*", name)
        groups.setdefault(kind, []).append(name)
    shown = [
        f"{_cut(kind)} ({len(same)})" if len(same) > 1 else _cut(same[0])
        for kind, same in groups.items()
    ]
    more = [f"{len(shown) - MOST_SHOWN} more"] if len(shown) > MOST_SHOWN else []
    return ", ".join([*shown[:MOST_SHOWN], *more])


def _cut(name: str) -> str:
    return printable(name if len(name) <= LONGEST_SHOWN else name[:LONGEST_SHOWN] + "...")
