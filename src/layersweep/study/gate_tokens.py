"""The gate's tokens: a stretch of the text from which there is something to learn for its copy.

A text that repeats itself, as passkey haystacks do, is as easy the first time, and sends its few
tokens to few experts: it would say nothing of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from layersweep.errors import Fallback
from layersweep.text.tokenizer import TextTokenizer

SEARCHED = 8192  # characters of the text
# Least share of different pairs among a stretch's neighbours: 903 of the bundled text's 912
# stretches have it, a line that repeats itself has 0.02.
VARIED = 0.4
PARAGRAPH = """\
The harbour master kept two ledgers. In the first she wrote what everybody could see: the names of
ships, the hour of the tide, how many crates of oranges had come from Valencia and who had signed
for them. The second, bound in green cloth, held the things that people told her while they waited
for the fog to lift. A cook from Bergen explained why bread rises faster near the engine room. Twin
brothers argued over the price of a violin; neither could play it. Once a surveyor, on his way to
measure an island, asked whether stone remembers heat, and stayed until midnight to draw diagrams
on the back of a customs form. She never judged these stories by their truth. What counted was
whether somebody had looked closely at something: rope, yeast, granite, a stubborn child. When the
port was rebuilt in 1931 and the old office pulled down, workmen found both books beneath a floor
board. The museum took the ledger with the oranges, because historians of trade had asked for it,
and returned the other to her nephew, a dentist, who read a page each evening to his patients'
children and so, without intending it, taught half the town how to listen. Years later an engineer
would claim that his first bridge began with the cook's remark about warm bread: materials swell,
joints must give way a little, and whatever cannot move will sooner or later crack.
"""


@dataclass(frozen=True)
class GateTokens:
    """One copy of the tokens, BOS ahead where there is one. `fallbacks` says where they are from if
    not from the beginning of the text."""

    ids: list[int]
    fallbacks: tuple[Fallback, ...] = ()


def choose_tokens(text: str, tokenizer: TextTokenizer, bos: int | None, count: int) -> GateTokens:
    """The first stretch of the text that is varied, `count` tokens with BOS; or the paragraph."""
    lead = [] if bos is None else [bos]
    size = count - len(lead)
    ids = tokenizer.encode(text[:SEARCHED])
    for start in range(0, len(ids) - size + 1, size):
        stretch = ids[start : start + size]
        if is_varied(stretch):
            later = _instead(f"tokens {start} to {start + size - 1}")
            return GateTokens([*lead, *stretch], (later,) if start else ())
    ours = _instead("a paragraph of its own")
    return GateTokens([*lead, *tokenizer.encode(PARAGRAPH)][:count], (ours,))


def is_varied(ids: list[int]) -> bool:
    pairs = list(pairwise(ids))
    return len(set(pairs)) >= VARIED * len(pairs)


def _instead(used: str) -> Fallback:
    why = "the text repeats itself there, or is shorter"
    return Fallback("gate", "the first tokens of the text", used, why)
