"""The reference text: prose, dialogue, lists, code and tables of the package's own, from which
arms with @fit=1 take their coordinates. No study measures on it.

Changing it changes what these codecs make: their version rises with it.
"""

from __future__ import annotations

from pathlib import Path

from layersweep.text.tokenizer import TextTokenizer

TEXT = Path(__file__).with_name("reference.txt")
MOST = 1024  # tokens


def reference_ids(tokenizer: TextTokenizer, bos: int | None, limit: int) -> tuple[int, ...]:
    """Its first tokens, at most MOST and `limit`, BOS ahead where there is one."""
    lead = [] if bos is None else [bos]
    return tuple([*lead, *tokenizer.encode(TEXT.read_text("utf-8"))][: min(MOST, limit)])
