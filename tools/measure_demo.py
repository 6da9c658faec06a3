"""Measure the bundled model as it is shipped and write the numbers of its card.

    python tools/measure_demo.py            # writes src/layersweep/demo/model/card.json

Held-out perplexity on the first 80 windows of 1024 + 512 tokens (the 511 last tokens of each
are scored), 60 needles at 4096 tokens in one-needle and 8-needle haystacks with the exact
cache, and the NLL that the gate must find again.
"""

from __future__ import annotations

import json
import math

import numpy as np

import layersweep
from layersweep.checkpoint.layout import demo_folder
from layersweep.statistics.intervals import wilson_interval
from layersweep.study.gate import COPY, Gate
from layersweep.study.gate_tokens import choose_tokens
from layersweep.tasks.needle.task import NeedleTask
from layersweep.tasks.needle.trials import make_trials
from layersweep.tasks.perplexity.task import PerplexityTask
from layersweep.tasks.settings import DEPTHS, EvalSettings
from layersweep.text.encoding import EncodedText
from layersweep.text.source import load_text
from layersweep.text.tokenizer import TextTokenizer
from layersweep.text.windows import cut_windows


def needles(model: layersweep.Model, tokenizer: TextTokenizer, text: str, keys: int) -> dict:
    """60 teacher-forced trials with the exact cache alone."""
    trials = make_trials(
        EncodedText(text, tokenizer),
        contexts=(4096,), depths=DEPTHS, per_depth=6, keys=keys, bos="auto",
        seed=0, max_context=model.checkpoint.decoder.max_position_embeddings,
    )  # fmt: skip
    job = NeedleTask(trials, [], tokenizer, EvalSettings(niah_keys=keys))
    model.run(job.tiles(), job.read)
    job.settle()
    found = sum(job.numbers.correct["exact"])
    return {
        "context": 4096,
        "keys": keys,
        "correct": found,
        "n": len(trials),
        "wilson95": wilson_interval(found, len(trials)),
        "answer_nll": float(np.mean(job.numbers.answer_nll["exact"])),
    }


def main() -> None:
    model = layersweep.load("demo", device="cpu")
    folder = demo_folder()
    tokenizer, text = TextTokenizer.load(folder), load_text(None, "demo").text
    windows = cut_windows(
        EncodedText(text, tokenizer), segments=80, prefix=1024, continuation=512, bos="auto"
    )  # fmt: skip
    job = PerplexityTask(windows, [], False, model.compute.device)
    model.run(job.tiles(), job.read)
    job.settle()
    nll = float(job.numbers.nll["exact"].mean())
    gate = Gate(model.checkpoint.decoder, choose_tokens(text, tokenizer, None, COPY), None)
    model.run([gate.tile()], lambda tile, number, sequence, logits: gate.check_logits(logits[0]))
    assert gate.copies_nll is not None
    first, second = (round(value, 5) for value in gate.copies_nll)
    card = {
        "fingerprint": model.checkpoint.fingerprint,
        "gate": {"tokens_sha": gate.tokens_sha, "nll": first, "nll_repeated": second},
        "held_out": {"windows": 80, "nll": round(nll, 5), "perplexity": round(math.exp(nll), 4)},
        "needle": [needles(model, tokenizer, text, keys) for keys in (1, 8)],
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
