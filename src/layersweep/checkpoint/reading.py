"""From the headers of a folder to a validated Checkpoint: every weight found, nothing left over."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layersweep.checkpoint.beside import ADAPTER, adapter_note, unused_files
from layersweep.checkpoint.config import Config, parse_config
from layersweep.checkpoint.files import Folder, read_small
from layersweep.checkpoint.fused import straddled_elements, weights_of
from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.shards import Shards, open_shards
from layersweep.checkpoint.storage import NO_SETTINGS, Headers, Settings, Storage, formats_of
from layersweep.checkpoint.storage.four_bit import FourBit
from layersweep.checkpoint.strict_json import TOKENIZER_VALUES, UnusableJson, parse_json
from layersweep.checkpoint.weights import Checkpoint, Weight
from layersweep.collector import collector_paused
from layersweep.families.names import LAYERS, Fused, Wanted
from layersweep.families.spec import Decoder
from layersweep.families.weights import embed_block, head_block
from layersweep.problems import FileProblem, Problem

if TYPE_CHECKING:
    from layersweep.families.registry import AnyNames

DISAGREE = "config.json and the tensors disagree; take both from the same model"
_PLACE = re.compile(re.escape(LAYERS) + r"(\d+)\.(?:\w+\.experts\.(?:\w+\.)?(\d+)\.)?")


@collector_paused()
def scan_folder(
    folder: Folder, source: str, revision: str | None, path: Path, *, generic: bool = False
) -> tuple[Checkpoint | None, list[Problem]]:
    """The checkpoint in `folder` (a local one is at `path`), or everything that is wrong.
    `generic`: see families/registry.describe."""
    problems: list[Problem] = []
    notes: list[str] = []
    described, raw_config = _open_config(folder, problems, generic=generic)
    decoder, names = described.decoder, described.names
    shards = open_shards(folder, problems, notes)
    if decoder is None or names is None or problems:
        return None, problems
    place = Place(folder.label, f"{folder.label}/config.json", DISAGREE, str)
    values = folder.has_values
    layout = Layout(
        place, shards, decoder, names, problems, notes, has_values=values,
        settings=described.settings,
    )  # fmt: skip
    weights = layout.weights()
    if problems:
        return None, problems
    files = folder.names()
    notes.extend(described.settings.notes)
    notes.extend(adapter_note(files))
    notes.extend(_tokenizer_note(folder, decoder))
    if not folder.has_values:
        notes.append("headers only: values of scales and quant_state were not checked")
    checkpoint = Checkpoint(
        source=source,
        revision=revision,
        folder=path,
        decoder=decoder,
        weights=weights,
        files=tuple(source.path for source in shards.sources.values()),
        fingerprint=fingerprint(shards, raw_config),
        nbytes=sum(shards.tensors[name].nbytes for name in layout.used & shards.tensors.keys()),
        notes=tuple(notes),
        unused_fields=described.unused,
        unused_files=unused_files(files, shards.sources),
    )
    return checkpoint, []


def _open_config(folder: Folder, problems: list[Problem], *, generic: bool) -> tuple[Config, bytes]:
    where = f"{folder.label}/config.json"
    if "config.json" not in folder.names():
        needed = "the model's config.json"
        hint = "give the folder that holds config.json and the .safetensors files"
        if gguf := sorted(name for name in folder.names() if name.endswith(".gguf")):
            hint = f"give the GGUF file itself: {folder.label}/{gguf[0]}"
        if ADAPTER in folder.names():
            hint = f"{ADAPTER} says that this is an adapter: merge it into its model, and give that"
        problems.append(Problem(where, None, "no such file", needed, hint))
        return Config(None, None, problems), b""
    try:
        raw = read_small(folder, "config.json")
    except FileProblem as error:
        problems.append(error.problem)
        return Config(None, None, problems), b""
    described = parse_config(raw, where, generic=generic)
    problems.extend(described.problems)
    return described, raw


@dataclass(frozen=True)
class Place:
    """How messages name where a model is, what describes it, what to do where that is not true,
    and a tensor that is missing."""

    label: str
    config: str
    disagree: str
    spell: Callable[[str], str]


class Layout:
    """Finds the tensors of every weight; owns which tensors were used."""

    def __init__(
        self,
        place: Place,
        shards: Shards,
        decoder: Decoder,
        names: AnyNames,
        problems: list[Problem],
        notes: list[str],
        *,
        has_values: bool,
        settings: Settings = NO_SETTINGS,
    ) -> None:
        self.place, self.shards = place, shards
        self.decoder, self.names = decoder, names
        self.tensors, self.problems, self.notes = shards.tensors, problems, notes
        self.used: set[str] = set()
        self.seen: dict[str, list[str]] = {}
        read = self._read if has_values else None
        self.headers = Headers(shards.tensors, read, problems, self.seen, settings)
        self.formats = formats_of(shards.tensors)

    def weights(self) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        if self.decoder.generic is None and not self._counts_fit():
            return weights
        for wanted in self.names.outside(embed_block(self.decoder), self.formats):
            self._add(weights, wanted)
        for layer in range(self.decoder.num_hidden_layers):
            wants = self.names.layer(self.decoder, layer, self.formats)
            for fused in wants.fused:
                self._add_fused(weights, fused)
            for wanted in wants.single:
                self._add(weights, wanted)
        for wanted in self.names.outside(head_block(self.decoder), self.formats):
            if wanted.name != "lm_head" or not self._tied(wanted):
                self._add(weights, wanted)
        if "lm_head" not in weights and "embed" in weights and self.decoder.tie_word_embeddings:
            embed = weights["embed"]
            weights["lm_head"] = Weight("lm_head", embed.shape, embed.storage)
        self._check_leftovers()
        self._note_what_was_seen(weights)
        return weights

    def _counts_fit(self) -> bool:
        """Whether the shards name as many layers and experts as the config. Were it believed, its
        2^31 layers would be looked for one by one."""
        there = _experts_by_layer(self.tensors)
        if self.decoder.num_hidden_layers > len(there):
            count = self.decoder.num_hidden_layers
            self._too_many(f"num_hidden_layers = {count}", f"{len(there)} layers")
            return False
        for layer in range(self.decoder.num_hidden_layers):
            experts, own = self.decoder.layers[layer].feed.experts, len(there[str(layer)])
            fused = self.names.has_fused_experts(layer, self.formats)
            if experts > own and not fused:
                self._too_many(f"{experts} experts of layer {layer}", f"{own}")
                return False
        return True

    def _too_many(self, found: str, there: str) -> None:
        needed = f"the {there} in the shards"
        self.problems.append(Problem(self.place.config, None, found, needed, self.place.disagree))

    def _read(self, tensor: StoredTensor) -> bytes:
        return self.shards.sources[tensor.file.name].read(tensor.offset, tensor.nbytes)

    def _tied(self, head: Wanted) -> bool:
        return self.decoder.tie_word_embeddings and head.bases[0] not in self.formats

    def _find(self, what: str, bases: tuple[str, ...]) -> str | None:
        found = [base for base in bases if base in self.formats]
        for base in found:
            self.used.add(base)
            self.used.update(self.formats[base].companions(base))
        if len(found) == 1:
            return found[0]
        if found:
            hint = "two layouts are mixed in one folder"
            also, needed = f"also {found[1]}", f"one {what}"
            self.problems.append(Problem(self._file_of(found[0]), found[0], also, needed, hint))
        else:
            names = list(dict.fromkeys(map(self.place.spell, bases)))
            needed = " or ".join(names[:2]) if len(names) < 3 else f"{names[0]} (or its newer name)"
            label, hint = self.place.label, self.place.disagree
            self.problems.append(Problem(label, names[0], "no such tensor", needed, hint))
        return None

    def _file_of(self, base: str) -> str:
        names = (base, *self.formats[base].companions(base))
        return str(next(self.tensors[name].file for name in names if name in self.tensors))

    def _add(self, weights: dict[str, Weight], wanted: Wanted) -> None:
        base = self._find(wanted.name, wanted.bases)
        if base is None:
            return
        storage = self._match(base, wanted.shape)
        if storage is not None:
            weights[wanted.name] = Weight(wanted.name, wanted.shape, storage)

    def _match(self, base: str, shape: tuple[int, ...]) -> Storage | None:
        return self.formats[base].match(self.headers, base, shape)

    def _add_fused(self, weights: dict[str, Weight], fused: Fused) -> None:
        base = self._find(f"{fused.bases[0]}", fused.bases)
        if base is None:
            return
        storage = self._match(base, fused.shape)
        if storage is None:
            return
        if not storage.plain and fused.transposed:
            found, needed = f"{storage.kind} columns", "float, or rows"
            hint = "quantize the experts one by one"
            self.problems.append(Problem(str(storage.stored[0].file), base, found, needed, hint))
            return
        if elements := straddled_elements(fused, storage):
            found = (
                f"4-bit blocks of {storage.block} elements that reach from one expert's "
                "weight into the next"
            )
            needed = f"a block size that divides the {elements} elements of each"
            hint = "quantize the experts one by one, or in a smaller block size"
            self.problems.append(Problem(str(storage.stored[0].file), base, found, needed, hint))
            return
        whole = Weight(base, fused.shape, storage)
        weights.update((one.name, one) for one in weights_of(whole, fused))

    def _check_leftovers(self) -> None:
        drafts = self._draft_layers()
        for name, tensor in self.tensors.items():
            if name in self.used or self.names.ignores(name) or name.startswith(drafts):
                continue
            if self.headers.settings.ignores(name):
                self.headers.note(
                    "scales of activations are not used: only weights are quantized", tensor
                )
                continue
            if name == "lm_head.weight" and self.decoder.tie_word_embeddings:
                continue
            found = f"unexpected {tensor.describe()}"
            needed = f"only tensors of the architecture in {Path(self.place.config).name}"
            self.problems.append(
                Problem(str(tensor.file), tensor.name, found, needed, self.place.disagree)
            )

    def _draft_layers(self) -> tuple[str, ...]:
        """How names of layers for multi-token prediction begin."""
        first, there = self.decoder.num_hidden_layers, _experts_by_layer(self.tensors)
        last = first + self.decoder.draft_layers
        found = [str(layer) for layer in range(first, last) if str(layer) in there]
        for layer in found:
            self.notes.append(f"layer {layer} is for multi-token prediction: it is not run")
        return tuple(f"{LAYERS}{layer}." for layer in found)

    def _note_what_was_seen(self, weights: dict[str, Weight]) -> None:
        for note, names in self.seen.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.notes.append(f"{names[0]}{more}: {note}")
        routers = (weight.storage for name, weight in weights.items() if name.endswith(".router"))
        if any(isinstance(storage, FourBit) for storage in routers):
            self.notes.append("the router is stored in 4 bits")


def _experts_by_layer(names: Iterable[str]) -> defaultdict[str, set[str]]:
    """Layer -> its experts that have names of their own (none where they are fused)."""
    experts: defaultdict[str, set[str]] = defaultdict(set)
    for place in filter(None, map(_PLACE.match, names)):
        experts[place[1]].update(filter(None, [place[2]]))
    return experts


def _tokenizer_note(folder: Folder, decoder: Decoder) -> Iterable[str]:
    """A warning when the tokenizer knows more ids than the embedding has rows."""
    if "tokenizer.json" not in folder.names() or not folder.has_values:
        return
    try:
        tokenizer, _ = parse_json(read_small(folder, "tokenizer.json"), TOKENIZER_VALUES)
        vocabulary = tokenizer["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in tokenizer.get("added_tokens") or ()]
        largest = max((one for one in (*ids, *added) if type(one) is int), default=-1)
    except (UnusableJson, LookupError, TypeError, AttributeError, FileProblem):
        yield "tokenizer.json could not be read: its size was not compared with the vocabulary"
        return
    if largest >= decoder.vocab_size:
        yield (
            f"tokenizer.json has ids up to {largest}, the vocabulary ends at "
            f"{decoder.vocab_size - 1}: text that uses more is refused"
        )


def fingerprint(shards: Shards, raw_config: bytes) -> str:
    """sha256 over shard names, sizes and headers, and config.json; never the data."""
    digest = hashlib.sha256()
    for name, source in sorted(shards.sources.items()):
        header = shards.headers[name].raw
        digest.update(f"{name}\0{source.size}\0{len(header)}\0".encode(errors="surrogateescape"))
        digest.update(header)
    digest.update(f"config.json\0{len(raw_config)}\0".encode())
    digest.update(raw_config)
    return digest.hexdigest()
