"""Whether a sequence starts with the BOS token: one answer for windows, needles and the gate."""

from __future__ import annotations

from typing import Literal

from layersweep.errors import InputError
from layersweep.text.tokenizer import TextTokenizer

BosMode = Literal["auto", "always", "never"]


def resolve_bos(tokenizer: TextTokenizer, bos: BosMode) -> int | None:
    """Id of the BOS token to put first, or None for none.

    `auto` puts it where the tokenizer's default call does. Raises InputError for `always`
    with a tokenizer that has no BOS, and for any other word.
    """
    if bos not in ("auto", "always", "never"):
        raise InputError(f"--bos: found '{bos}', needed auto, always or never")
    if bos == "always" and tokenizer.bos_id is None:
        raise InputError(
            "--bos always: found a tokenizer without a BOS token, needed one",
            hint="use --bos auto or --bos never",
        )
    wanted = bos == "always" or (bos == "auto" and tokenizer.bos_by_default)
    return tokenizer.bos_id if wanted else None
