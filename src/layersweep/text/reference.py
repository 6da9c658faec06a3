"""The reference text: prose, dialogue, lists, code and tables of the package's own, from which
arms with @fit=1 take their coordinates. No study measures on it.

Changing it changes what these codecs make: their version rises with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from layersweep.kv.arms import Arm
from layersweep.sweep.model import Model
from layersweep.sweep.shapes import can_fit, length_limit
from layersweep.text.tokenizer import TextTokenizer, check_ids

TEXT = Path(__file__).with_name("reference.txt")
MOST = 1024  # tokens


def reference_ids(tokenizer: TextTokenizer, bos: int | None, limit: int) -> tuple[int, ...]:
    """Its first tokens, at most MOST and `limit`, BOS ahead where there is one."""
    lead = [] if bos is None else [bos]
    return tuple([*lead, *tokenizer.encode(TEXT.read_text("utf-8"))][: min(MOST, limit)])


def with_reference(
    model: Model, arms: Sequence[Arm], tokenizer: TextTokenizer, bos_id: int | None
) -> Model:
    """With the reference text, where an arm takes its coordinates from it and the sweep does."""
    if not (can_fit(model.decoder) and any(arm.fits for arm in arms)):
        return model
    ids = reference_ids(tokenizer, bos_id, length_limit(model.decoder)[0])
    check_ids(ids, model.decoder.vocab_size)
    beside = tuple(replace(one, reference=ids) for one in model.beside)
    return replace(model, reference=ids, beside=beside)
