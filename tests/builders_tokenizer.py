"""Small tokenizers of the families that matter, trained in the test run, saved as folders."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from layersweep.text.source import load_text
from layersweep.text.tokenizer import TextTokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]

# In the manner of the instruct models of the Mistral family.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[INST] {{ message['content'] | trim }} [/INST]{% endfor %}"
)
# With turns marked by special tokens, and no BOS of its own.
MARKED_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def demo_text(characters: int) -> str:
    return load_text(None, "demo").text[:characters]


@functools.cache
def train_byte_level(vocab_size: int = 700) -> Tokenizer:
    """Bytes, single digits, no normalizer: the demo model's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text(60_000)], trainer)
    return tokenizer


@functools.cache
def train_sentencepiece(vocab_size: int = 500) -> Tokenizer:
    """A blank put first, blanks as "▁", no pre-tokenizer, byte fallback: the Llama 2 kind."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # learnt within words and digit by digit, as such models were, then applied without a split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=vocab_size + 256, special_tokens=SPECIAL + fallback, show_progress=False
    )
    tokenizer.train_from_iterator(demo_text(40_000).splitlines(keepends=True), trainer)
    tokenizer.pre_tokenizer = None
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: len(SPECIAL)]  # bytes are plain entries
    return Tokenizer.from_str(json.dumps(saved))


def save_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    puts_bos: bool = False,
    chat_template: str | None = None,
    **settings: object,
) -> Path:
    """tokenizer.json and tokenizer_config.json; `puts_bos`: by the post-processor."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if puts_bos:
        copy.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", copy.token_to_id("<s>"))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    copy.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def load_kind(kind: str) -> TextTokenizer:
    """One of five: bytes, bytes+bos, sentencepiece, inst and marked (the last two chat)."""
    bytes_kind = kind in ("bytes", "bytes+bos", "marked")
    template = {"inst": CHAT_TEMPLATE, "marked": MARKED_TEMPLATE}.get(kind)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(
            Path(folder),
            train_byte_level() if bytes_kind else train_sentencepiece(),
            puts_bos=kind not in ("bytes", "marked"),
            chat_template=template,
        )
        return TextTokenizer.load(Path(folder))
