"""Tokenizer files as transformers reads them: the same ids, BOS and prompts over grids of files.

Everything that imports transformers for tokenizers is here: the import takes five seconds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from builders_tokenizer import CHAT_TEMPLATE, save_tokenizer, train_byte_level, train_sentencepiece
from test_gguf_tokenizer import tokenizer_file

from layersweep.text.bos import resolve_bos
from layersweep.text.chat import Message
from layersweep.text.tokenizer import TextTokenizer

Json = dict[str, Any]
TEXTS = (
    "import os\n<|turn|>user\nhello <|end|> there<|end|>\n<|turn|>assistant\n",
    "x<|turn|>y  <|turn|>  z <|end|>",
    "a</s>b <s> <pad><image>",
    "TURN<|Turn|>turn plain\nnext <0x41>  é",
)


@pytest.fixture(scope="module")
def theirs() -> Callable[[Path], Any]:
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoTokenizer.from_pretrained  # type: ignore[no-any-return]


def token(content: str, **flags: bool) -> Json:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, "special": True, **flags}


def files(folder: Path, settings: Json, **others: Json) -> Path:
    """A byte-level tokenizer with these settings, and other JSON files by name."""
    settings = {"unk_token": "<unk>", "chat_template": CHAT_TEMPLATE} | settings
    save_tokenizer(folder, train_byte_level(), **settings)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


FLAGS = [
    {},
    {"special": False},
    {"special": False, "normalized": True},
    {"lstrip": True},
    {"rstrip": True, "special": False},
    {"single_word": True},
    {"lstrip": True, "rstrip": True, "special": False, "normalized": True},
]
NUMBERS = {
    "the next ids": (700, 701),
    "backwards": (701, 700),
    "a hole": (705, 703),
    "ids of other tokens": (1, 400),
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "plain")
def test_added_tokens_of_the_settings_have_the_ids_of_transformers(
    tmp_path: Path, theirs: Callable[[Path], Any], numbers: tuple[int, int], flags: Json
) -> None:
    decoder = {
        str(number): token(content, **flags)
        for number, content in zip(numbers, ("<|turn|>", "<|end|>"), strict=True)
    }
    folder = files(tmp_path, {"added_tokens_decoder": decoder}, added_tokens={"unread": 720})
    found, oracle = TextTokenizer.load(folder), theirs(folder)
    assert "<|turn|>" in oracle.get_added_vocab()
    check(found, oracle)
    said = [note for note in found.notes if "as transformers numbers it" in note]
    assert bool(said) is (set(numbers) != {700, 701})


def check(found: TextTokenizer, oracle: Any) -> None:
    """Both as chat, where special tokens are parsed, and as text, where they are not."""
    for text in TEXTS:
        assert found.encode_chat(text)[0] == oracle.encode(text, add_special_tokens=False)
        split = oracle.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert found.encode(text) == split


BESIDE: dict[str, tuple[Json, Json]] = {
    "extra": ({"extra_special_tokens": ["<|turn|>", "<|end|>"]}, {}),
    "extra by name": ({"extra_special_tokens": {"turn_token": "<|turn|>"}}, {}),
    "additional": ({"additional_special_tokens": ["<|end|>", "<|turn|>"]}, {}),
    "named": ({"pad_token": "<pad>", "image_token": "<image>", "mask_token": "<|end|>"}, {}),
    "typed": ({"pad_token": token("<pad>", lstrip=True) | {"__type": "AddedToken"}}, {}),
    "added_tokens.json": ({}, {"added_tokens": {"<|end|>": 701, "<|turn|>": 700, "</s>": 2}}),
    "special and added": (
        {"extra_special_tokens": ["<|turn|>"]},
        {"added_tokens": {"<|turn|>": 702, "<|end|>": 700}},
    ),
    "the map": (
        {"pad_token": "<other>"},
        {
            "special_tokens_map": {
                "pad_token": token("<pad>", rstrip=True),
                "image_token": "<image>",
                "additional_special_tokens": ["<|turn|>"],
            }
        },
    ),
    "the map is not read beside added_tokens_decoder": (
        {"added_tokens_decoder": {"700": token("<|turn|>")}, "eos_token": "<|turn|>"},
        {
            "special_tokens_map": {"pad_token": "<pad>", "eos_token": "<|end|>"},
            "added_tokens": {"<|end|>": 701},
        },
    ),
    "the map's list joins": (
        {"extra_special_tokens": ["<|turn|>"]},
        {"special_tokens_map": {"extra_special_tokens": ["<|turn|>", {"content": "<|end|>"}]}},
    ),
    "flags that differ": ({"added_tokens_decoder": {"2": token("</s>", lstrip=True)}}, {}),
    "a plain token that is named": (
        {"added_tokens_decoder": {"700": token("<pad>", special=False)}, "pad_token": "<pad>"},
        {},
    ),
    "specials stay text": ({"split_special_tokens": True, "extra_special_tokens": ["<pad>"]}, {}),
    "settings that no text meets": (
        {"clean_up_tokenization_spaces": True, "legacy": False, "add_eos_token": True},
        {},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_tokens_of_every_file_have_the_ids_of_transformers(
    tmp_path: Path, theirs: Callable[[Path], Any], case: str
) -> None:
    settings, others = BESIDE[case]
    folder = files(tmp_path, settings, **others)
    check(TextTokenizer.load(folder), oracle := theirs(folder))
    named = TextTokenizer.load(folder).chat_tokens
    assert named == oracle.special_tokens_map


CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]


@pytest.mark.parametrize(
    ("kind", "add_bos", "puts_bos"),
    list(product([*CLASSES, None], [True, False, None], [True, False])),
)
def test_bos_is_where_transformers_puts_it(
    tmp_path: Path,
    theirs: Callable[[Path], Any],
    kind: str | None,
    add_bos: bool | None,
    puts_bos: bool,
) -> None:
    settings: Json = {} if kind is None else {"tokenizer_class": kind}
    settings |= {} if add_bos is None else {"add_bos_token": add_bos}
    found = TextTokenizer.load(files(tmp_path, settings | {"puts_bos": puts_bos}))
    first = theirs(tmp_path)("import os")["input_ids"][0]
    assert (resolve_bos(found, "auto") == 1) is (first == 1)
    disagree = add_bos is not None and add_bos is not puts_bos
    assert any("add_bos_token" in note for note in found.notes) is disagree


TEMPLATES = [
    CHAT_TEMPLATE,
    "{% if tools is not none %}tools{% endif %}{% if documents is defined %}d{% endif %}",
    "{{ messages | tojson }}{{ pad_token }}{{ image_token }}{{ sep_token is defined }}",
    "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}",
    "{%- set n = namespace(x=1) %}{{ n.x }}{{ dict(a=1)['a'] }}{% break %}"[:-11],
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_rendered_as_by_transformers(
    tmp_path: Path, theirs: Callable[[Path], Any], template: str
) -> None:
    settings = {"chat_template": template, "pad_token": "<pad>", "image_token": "<image>"}
    folder = files(tmp_path, settings)
    said = [("user", "<a> & 'é'"), ("assistant", "to </b>\n"), ("user", " and 'c'?")]
    messages = [{"role": role, "content": content} for role, content in said]
    tokenizer, found = theirs(folder), TextTokenizer.load(folder)
    for count in (1, 3):
        text, ids = (
            tokenizer.apply_chat_template(
                messages[:count], tokenize=tokenize, add_generation_prompt=True, return_dict=False
            )
            for tokenize in (False, True)
        )
        ours = [Message(role, content) for role, content in said[:count]]
        assert (found.render_chat(ours), found.encode_messages(ours)) == (text, ids)


@pytest.mark.parametrize(
    ("in_settings", "root", "named"),
    list(product([None, "S", [{"name": "default", "template": "L"}],
                  [{"name": "rag", "template": "R"}]], [False, True], [False, True])),
)  # fmt: skip
def test_the_default_template_is_that_of_transformers(
    tmp_path: Path, theirs: Callable[[Path], Any], in_settings: Any, root: bool, named: bool
) -> None:
    folder = files(tmp_path, {"chat_template": in_settings})
    if root:
        (folder / "chat_template.jinja").write_text("J")
    if named:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("F")
    oracle = theirs(folder)
    found = TextTokenizer.load(folder)
    try:
        expected = oracle.get_chat_template()
    except ValueError:  # none, or none with the name "default"
        expected = None
    assert found.chat_template == expected
    skipped = expected is None and bool(in_settings or named)
    assert any("chat template" in note for note in found.notes) is skipped


@pytest.mark.parametrize("kind", [*CLASSES, None])
@pytest.mark.parametrize(
    "settings",
    [{"add_prefix_space": True}, {"add_prefix_space": False}, {"legacy": True}, {"legacy": False}],
    ids=str,
)
def test_the_pipeline_is_that_of_the_file_whatever_the_settings_say(
    tmp_path: Path, theirs: Callable[[Path], Any], kind: str | None, settings: Json
) -> None:
    settings = settings | {"chat_template": CHAT_TEMPLATE, "unk_token": "<unk>"}
    settings |= {} if kind is None else {"tokenizer_class": kind}
    save_tokenizer(tmp_path, train_sentencepiece(), **settings)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    check(TextTokenizer.load(tmp_path), theirs(tmp_path))


def test_without_tokenizer_json_transformers_converts_and_it_is_noted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, train_byte_level(), tokenizer_class="GPT2Tokenizer", unk_token="<unk>")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").unlink()
    found = TextTokenizer.load(tmp_path)
    assert found.notes == (
        "tokenizer: no tokenizer.json, converted from vocab.json by transformers",
    )
    assert found.decode(found.encode("def encode(self):")) == "def encode(self):"


SPLIT_TEXT = (
    "I'll say it's DON'T we'Ve 1234567 a12b3\tif x:\n\n    return (a+b)//2;  // \r\n\r\n  end   \n"
    "été naïve 日本語です。 ½ ٢٣٤ ǅx \U0001f600\u200d!? ...!!\n/path/x"
)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-4o"])
def test_bytes_of_a_gguf_file_are_split_as_transformers_splits_them(
    pre: str, theirs: Callable[..., Any], tmp_path: Path
) -> None:
    path = tokenizer_file(tmp_path / "model.gguf", train_byte_level(), "gpt2", ggml__pre=pre)
    expected = theirs(tmp_path, gguf_file=path.name)
    found = TextTokenizer.load(path).encode(SPLIT_TEXT)
    assert found == expected(SPLIT_TEXT, add_special_tokens=False).input_ids
