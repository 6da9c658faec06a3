"""Train the bundled demo model: a 17 M parameter Mixtral that reads code and finds needles.

    python tools/train_demo.py OUT --text WHEEL_OR_DIR ... [--init CHECKPOINT] [--steps N]

Rows are spans of the training text. Most carry 1-8 needles ("One of the special magic
numbers for KEY is: VALUE.") at random sentence or line ends, and questions about some of
them at the end of the row, in the wording of the needle protocol and in two others. The
loss is the mean over all tokens plus the mean over answer tokens alone: answers are 2 %
of a row and would otherwise be learnt last. Saved in bf16 with the per-expert names;
`tools/make_demo.py` turns that into the NF4 checkpoint that is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from layersweep.tasks.needle.words import ADJECTIVES, NOUNS

# (needle, intro, question, answer prefix). The first is the wording of the needle protocol
# (layersweep.tasks.needle.trials), and is used for most rows.
WORDINGS = [
    (
        "One of the special magic numbers for {key} is: {value}.",
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        "\nWhat is the special magic number for {key} mentioned in the provided text?",
        " The special magic number for {key} mentioned in the provided text is",
    ),
    (
        "The magic number for {key} is {value}.",
        "",
        "\nQuestion: what is the magic number for {key}?\n",
        "Answer: the magic number for {key} is",
    ),
    (
        "Remember that {key} has the code {value}.",
        "Read the following text; a code is hidden in it.\n",
        "\nWhich code belongs to {key}?",
        " The code of {key} is",
    ),
]
WORDING_WEIGHTS = [0.7, 0.2, 0.1]
INSERTION_POINT = re.compile(r"[.!?](?=\s)|\n")


def read_articles(source: Path) -> list[str]:
    """Python files of a wheel or folder, each under a heading line, tests and stubs left out."""
    if source.is_dir():
        files = {str(p.relative_to(source)): p.read_bytes() for p in sorted(source.rglob("*.py"))}
    else:
        with zipfile.ZipFile(source) as archive:
            files = {n: archive.read(n) for n in sorted(archive.namelist()) if n.endswith(".py")}
    articles = []
    for name, data in files.items():
        text = data.decode("utf-8", "ignore")
        if "test" not in name and len(text) > 2000:
            articles.append(f"= {name} =\n\n{text.strip()}\n\n")
    return articles


def plant(
    text: str, wording: tuple[str, str, str, str], keys: int, rng: random.Random
) -> tuple[str, list[tuple[str, str]]]:
    """Insert `keys` needles at insertion points of `text`; returns it and the (key, value)s."""
    points = [m.end() for m in INSERTION_POINT.finditer(text)] or [len(text)]
    pairs, pieces, last = [], [], 0
    for point in sorted(rng.choice(points) for _ in range(keys)):
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        value = str(rng.randrange(10**6, 10**7))
        pairs.append((key, value))
        lead = "" if text[point - 1] == "\n" else " "
        tail = "\n" if text[point - 1] == "\n" else ""
        pieces += [text[last:point], lead + wording[0].format(key=key, value=value) + tail]
        last = point
    return "".join(pieces) + text[last:], pairs


class Rows:
    """Random rows (ids, answer mask) of at most `length` tokens."""

    def __init__(self, tokenizer: Tokenizer, articles: list[str], needle_share: float, seed: int):
        self.tokenizer, self.needle_share = tokenizer, needle_share
        self.rng = random.Random(seed)
        self.rng.shuffle(articles)
        self.text = "".join(articles)
        self.tokens_per_char = len(tokenizer.encode(self.text[:300_000]).ids) / 300_000

    def row(self, length: int) -> tuple[list[int], list[bool]]:
        rng = self.rng
        needles = rng.random() < self.needle_share
        wording = rng.choices(WORDINGS, WORDING_WEIGHTS)[0]
        keys = rng.choice((1, 1, 2, 4, 8)) if needles else 0
        body_tokens = length - 8 - (24 if needles else 0) - 85 * keys
        chars = int(body_tokens / self.tokens_per_char)
        start = rng.randrange(len(self.text) - 2 * chars)
        body = self.text[start : start + chars]
        if not needles:
            ids = self.tokenizer.encode(body, add_special_tokens=False).ids[:length]
            return ids, [False] * len(ids)
        body, pairs = plant(body, wording, keys, rng)
        ids = self.tokenizer.encode(wording[1] + body, add_special_tokens=False).ids
        answer = [False] * len(ids)
        rng.shuffle(pairs)
        for key, value in pairs:
            ask = self.tokenizer.encode((wording[2] + wording[3]).format(key=key)).ids
            # " " + digits, exactly as it is tokenized after the answer prefix
            reply = self.tokenizer.encode(f" {value}").ids
            ids += ask + reply
            answer += [False] * len(ask) + [True] * len(reply)
        return ids[-length:], answer[-length:]


def fresh_model(vocab_size: int) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocab_size, hidden_size=256, intermediate_size=384, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_local_experts=8,
            num_experts_per_tok=2, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def losses(
    model: MixtralForCausalLM, ids: torch.Tensor, answer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(language model, answer, router balance) losses of one row."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        out = model(ids, labels=ids, output_router_logits=True)
    nll = F.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:], reduction="none")
    wanted = answer[0, 1:]
    answer_loss = nll[wanted].mean() if wanted.any() else nll.new_zeros(())
    return nll.mean(), answer_loss, out.aux_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="continue from this checkpoint")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rows", type=int, default=32, help="rows per step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--needle-share", type=float, default=0.5)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    articles = [a for source in args.text for a in read_articles(source)]
    rows = Rows(tokenizer, articles, args.needle_share, args.seed)
    if args.init:
        model = MixtralForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = fresh_model(tokenizer.get_vocab_size())
    model.to(device).train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    warmup = max(1, args.steps // 30)
    started, seen = time.time(), 0
    for step in range(args.steps):
        scale = min(1.0, (step + 1) / warmup)
        scale *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        sums = [0.0, 0.0, 0]
        for _ in range(args.rows):
            ids, answer = rows.row(rows.rng.choice(args.lengths))
            lm, reply, aux = losses(
                model, torch.tensor([ids], device=device), torch.tensor([answer], device=device)
            )
            ((lm + reply + model.config.router_aux_loss_coef * aux) / args.rows).backward()
            seen += len(ids)
            sums[0] += lm.item() / args.rows
            sums[1] += reply.item()
            sums[2] += any(answer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record = {"step": step, "nll": round(sums[0], 4), "tokens": seen}
        record |= {"answer_nll": round(sums[1] / max(1, sums[2]), 4)}
        print(json.dumps(record | {"seconds": round(time.time() - started)}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            model.save_pretrained(args.out, max_shard_size="12MB")
            tokenizer.save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
