"""Which tokens attention rests on, and the size of their keys and values: the table of
docs/codecs.md, "Attention sinks".

    python tools/measure_sinks.py models/smollm2-bf16 text.txt --tokens 768 --windows 2

The model is a Hugging Face folder that transformers loads. Attention is what the second half of
each window pays to the first half, in every layer and KV head. Prints one line of JSON:

    first, next     shares of it on token 0 and on tokens 1 to 3
    later_tokens    (layer, head, token) from token 8 on that get over 5 % each, as a share of all
    later           share of attention that these get together
    keys, values    their norms over the median of their layer, head and window
    words           the tokens that get most
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

FIRST, LARGE = 8, 0.05  # where "later" begins, and what a sink gets at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=768, help="of a window")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--skip", type=int, default=5000, help="tokens at the start of the text")
    given = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    bos = tokenizer("", add_special_tokens=True).input_ids[:1]
    text = given.text.read_text("utf-8")
    ids, own = tokenizer(text, add_special_tokens=False).input_ids, given.tokens - len(bos)
    starts = range(given.skip, given.skip + own * given.windows, own)
    rows = torch.tensor([bos + ids[start : start + own] for start in starts])
    found = measured(given.model, rows)
    found["words"] = {tokenizer.decode(token): n for token, n in found["words"].items()}
    print(json.dumps({"model": Path(given.model).name, "bos": bool(bos), **found}))


@torch.inference_mode()
def measured(folder: str, rows: Tensor) -> dict[str, Any]:
    """See the module's text; `words` by token id."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of each layer [B, heads, T / 2]
    half = rows.shape[1] // 2

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        groups, window = k.shape[1], options.get("sliding_window")
        at = torch.arange(k.shape[2])
        sight = at <= at[:, None]
        if window:
            sight = sight & (at > at[:, None] - window)
        scores = q.unflatten(1, (groups, -1)) @ k.transpose(2, 3).unsqueeze(2) * options["scaling"]
        paid = scores.masked_fill(~sight, -torch.inf).softmax(-1)  # [B, groups, queries, T, T]
        received = paid[:, :, :, half:, :half].mean((2, 3))
        norms = (x[:, :, :half].norm(dim=-1) for x in (k, v))
        seen.append((received, *(x / x[:, :, FIRST:].median(-1, True).values for x in norms)))
        return (paid @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("sinks", attend)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sinks"
    )
    model.base_model(rows)
    paid, keys, values = (torch.stack(part) for part in zip(*seen, strict=True))
    later = paid.clone()
    later[..., :FIRST] = 0
    sinks, total = later > LARGE, paid.sum()
    at = sinks.nonzero()
    words = Counter(rows[at[:, 1], at[:, 3]].tolist())

    def rounded(x: Tensor) -> float | None:
        return None if x.isnan() else round(x.item(), 4)

    return {
        "first": rounded(paid[..., 0].sum() / total),
        "next": rounded(paid[..., 1:4].sum() / total),
        "later_tokens": rounded(sinks.sum() / sinks[..., FIRST:].numel()),
        "later": rounded(later[sinks].sum() / total),
        "keys": rounded(keys[sinks].mean()),
        "values": rounded(values[sinks].mean()),
        "words": dict(words.most_common(3)),
    }


if __name__ == "__main__":
    main()
