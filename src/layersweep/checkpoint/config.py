"""config.json, every field that the maths depends on checked for type and range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layersweep.checkpoint.config_fields import foreign_fields, unused_fields
from layersweep.checkpoint.problems import TWICE, Problem, problems_error, show
from layersweep.checkpoint.strict_json import UnusableJson, parse_json
from layersweep.errors import CheckpointError

ARCHITECTURES = ("MixtralForCausalLM",)
LARGEST_COUNT = 1 << 31
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.2e-38, 3.4e38  # what is computed with, without denormals
HINT = "config.json must describe the tensors beside it; download both again"
DEFAULT_ROPE_THETA = 1e6  # transformers' own default for Mixtral
ROPE_FIELDS = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a Mixtral. `synthetic`: the weights were never trained."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | None
    synthetic: bool


def read_config(folder_or_json: Path | str) -> ModelConfig:
    """The configuration in a folder's config.json, or in that file. Raises CheckpointError."""
    path = Path(folder_or_json)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: found no readable file, needed the model's config.json", hint=HINT
        ) from error
    parsed = parse_config(raw, str(path))
    if parsed.config is None:
        raise problems_error(parsed.problems)
    return parsed.config


@dataclass(frozen=True)
class ParsedConfig:
    """`config` is None where there are `problems`; `unused`: fields that nothing looks at."""

    config: ModelConfig | None
    problems: list[Problem]
    unused: tuple[str, ...] = ()


def parse_config(raw: bytes, file: str) -> ParsedConfig:
    """The configuration in the bytes of config.json, or everything that is wrong with them."""
    try:
        fields, repeated = parse_json(raw)
    except UnusableJson as error:
        return ParsedConfig(None, [Problem(file, None, str(error), "a JSON object", HINT)])
    if not isinstance(fields, dict):
        found = "JSON that is no object"
        return ParsedConfig(None, [Problem(file, None, found, "a JSON object", HINT)])
    reader = _Fields(fields, file)
    reader.problems += [Problem(file, key, *TWICE, HINT) for key in repeated]
    architecture = reader.architecture()
    if architecture is None:
        return ParsedConfig(None, reader.problems)
    config = reader.config(architecture)
    unused = (*unused_fields(fields, reader.read), *reader.unused)
    return ParsedConfig(None if reader.problems else config, reader.problems, unused)


class _Fields:
    """Reads fields one by one; owns the list of problems and which fields were read. A wrong field
    reads as 1."""

    def __init__(self, fields: Mapping[str, object], file: str) -> None:
        self.fields, self.file = fields, file
        self.problems: list[Problem] = []
        self.read: set[str] = set()
        self.unused: list[str] = []

    def problem(self, field: str, found: object, needed: str, hint: str = HINT) -> None:
        self.problems.append(Problem(self.file, None, f"{field} = {_show(found)}", needed, hint))

    def get(self, field: str, default: object = None) -> object:
        self.read.add(field)
        return self.fields.get(field, default)

    def architecture(self) -> str | None:
        names = self.get("architectures")
        if isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES:
            return str(names[0])
        if names is None and self.get("model_type") == "mixtral":
            return "MixtralForCausalLM"
        found = names if names is not None else self.get("model_type")
        hint = "only Mixtral checkpoints can be run so far"
        self.problem("architectures", found, f"one of {', '.join(ARCHITECTURES)}", hint)
        return None

    def config(self, architecture: str) -> ModelConfig:
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        config = ModelConfig(
            architecture=architecture,
            vocab_size=self.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("intermediate_size"),
            num_hidden_layers=self.count("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=self.count("num_key_value_heads"),
            head_dim=self.head_dim(hidden, heads),
            num_local_experts=self.count("num_local_experts"),
            num_experts_per_tok=self.count("num_experts_per_tok"),
            rms_norm_eps=self.number("rms_norm_eps", self.get("rms_norm_eps")),
            rope_theta=self.rope_theta(),
            max_position_embeddings=self.count("max_position_embeddings"),
            sliding_window=self.optional_count("sliding_window"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            bos_token_id=self.token("bos_token_id"),
            eos_token_id=self.token("eos_token_id"),
            synthetic=self.flag("layersweep_synthetic"),
        )
        self.check_relations(config)
        return config

    def check_relations(self, config: ModelConfig) -> None:
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        if heads % shared:
            self.problem("num_key_value_heads", shared, f"a divisor of the {heads} heads")
        if config.num_experts_per_tok > config.num_local_experts:
            needed = f"at most num_local_experts = {config.num_local_experts}"
            self.problem("num_experts_per_tok", config.num_experts_per_tok, needed)
        bos = config.bos_token_id
        if bos is not None and bos >= config.vocab_size and not self.problems:
            self.problem("bos_token_id", bos, f"below vocab_size = {config.vocab_size}")
        if config.head_dim % 2 and not self.problems:
            self.problem("head_dim", config.head_dim, "an even number (RoPE turns pairs)")
        if self.get("hidden_act", "silu") != "silu":
            self.problem("hidden_act", self.get("hidden_act"), '"silu"')
        self.check_foreign()

    def count(self, field: str) -> int:
        value = self.get(field)
        if type(value) is int and 0 < value < LARGEST_COUNT:
            return value
        self.problem(field, value, "a positive integer")
        return 1

    def optional_count(self, field: str) -> int | None:
        return None if self.get(field) is None else self.count(field)

    def number(self, field: str, value: object) -> float:
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32  # false for NaN
        ):
            return float(value)
        self.problem(field, value, "a positive number")
        return 1.0

    def flag(self, field: str) -> bool:
        value = self.get(field)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(field, value, "true or false")
        return False

    def token(self, field: str) -> int | None:
        """A token id; of several (a list is allowed for eos) the first."""
        value = self.get(field)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return None
        if type(value) is int and 0 <= value < LARGEST_COUNT:
            return value
        self.problem(field, value, "a token id or null")
        return None

    def head_dim(self, hidden: int, heads: int) -> int:
        if self.get("head_dim") is not None:
            return self.count("head_dim")
        if hidden % heads:
            self.problem("hidden_size", hidden, f"a multiple of the {heads} attention heads")
        return max(1, hidden // heads)

    def rope_theta(self) -> float:
        """As transformers decides: `rope_scaling` goes before `rope_parameters`, and the theta in
        that object before the flat one. What is overruled must not disagree."""
        objects = {name: self.rope_object(name) for name in ("rope_scaling", "rope_parameters")}
        flat = self.get("rope_theta", DEFAULT_ROPE_THETA)
        decides = objects["rope_scaling"] or objects["rope_parameters"]
        theta = decides.get("rope_theta", flat)
        for name, parts in objects.items():
            other = parts.get("rope_theta", theta)
            if other != theta:
                self.problem(f"{name}.rope_theta", other, f"{_show(theta)}, as rope_scaling has it")
        if "rope_theta" in self.fields and flat is not None and flat != theta:
            needed = f"the rope_theta of rope_parameters, {_show(theta)}"
            self.problem("rope_theta", flat, needed)
        return self.number("rope_theta", theta)

    def rope_object(self, name: str) -> Mapping[str, object]:
        """`rope_parameters` or `rope_scaling`; empty where it says nothing."""
        parts = self.get(name)
        if parts is None:
            return {}
        if not isinstance(parts, dict):
            self.problem(name, parts, "an object or null")
            return {}
        kind = parts.get("rope_type", parts.get("type", "default"))
        hint = "scaled RoPE cannot be computed so far"
        if parts and kind != "default":
            self.problem("rope_type", kind, '"default"', hint)
        if any(isinstance(part, dict) for part in parts.values()):
            self.problem(name, parts, "one RoPE for all layers", hint)
        self.unused += [f"{name}.{key}" for key in parts if key not in ROPE_FIELDS]
        if parts.get("partial_rotary_factor", 1.0) != 1.0:
            self.problem("partial_rotary_factor", parts["partial_rotary_factor"], "1.0", hint)
        return parts

    def check_foreign(self) -> None:
        for name, plain in foreign_fields(self.fields):
            needed = " or ".join(["nothing", *map(_show, plain)])
            hint = f"{name} changes the maths: only a plain Mixtral can be computed so far"
            self.problem(name, self.fields[name], needed, hint)
        if (family := self.get("model_type", "mixtral")) != "mixtral":  # AutoConfig goes by it
            self.problem("model_type", family, '"mixtral", as architectures has it')
        layers = self.get("layer_types") or []
        if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
            self.problem("layer_types", layers, 'nothing, or "full_attention" for all')
        quantization = self.get("quantization_config") or {}  # the tensors say how they are stored
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        if method not in (None, "bitsandbytes"):
            self.problem("quantization_config.quant_method", method, '"bitsandbytes"')
        experts, same = self.get("num_local_experts"), self.get("num_experts")
        if same is not None and same != experts:  # transformers takes num_experts
            self.problem("num_experts", same, f"num_local_experts = {_show(experts)}, or nothing")


def _show(value: object) -> str:
    """As JSON spells it, where it is short."""
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else show(value)
