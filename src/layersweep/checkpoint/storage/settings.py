"""What config.json's `quantization_config` says of weights.

Tensors say nearly all: their names, dtypes and shapes. Of each method every field is known here,
so that one which changes how bytes are decoded cannot be passed over. Fields of ANY value change
nothing: how the model was calibrated, which modules were left out, which program wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layersweep.families.fields import spell
from layersweep.problems import Problem, show

FIELD = "quantization_config"
ANY = None
Rule = Any  # ANY, a tuple of allowed values, a mapping of fields, or EACH_GROUP
EACH_GROUP = "each group"
SIZES = "two multiples of 8"

_LEFT_OUT = dict.fromkeys(("modules_to_not_convert", "ignored_layers", "modules_to_convert"), ANY)
_NUMBERS: Mapping[str, Rule] = {  # of compressed-tensors and modelopt
    "num_bits": (4, 8), "type": ("int", "float"), "dynamic": (False, None),
    "block_structure": SIZES,
    "strategy": ("tensor", "channel", "group", "block", "tensor_group", None),
    **dict.fromkeys(("symmetric", "group_size", "actorder", "observer", "observer_kwargs"), ANY),
    **dict.fromkeys(("scale_dtype", "zp_dtype"), ANY),
}  # fmt: skip
_PACKINGS = (
    *("pack-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mixed-precision", "dense", None),
)
_GROUP: Mapping[str, Rule] = {
    "weights": _NUMBERS, "format": _PACKINGS, "output_activations": (None,),
    **dict.fromkeys(("targets", "input_activations"), ANY),
}  # fmt: skip
_GROUPS: Mapping[str, Rule] = {"config_groups": EACH_GROUP, "ignore": ANY, "kv_cache_scheme": ANY}

METHODS: Mapping[str, Mapping[str, Rule] | None] = {
    "bitsandbytes": None,  # its tensors say all
    "fp8": {
        "fmt": ("e4m3", None), "activation_scheme": ("dynamic", "static"), "dequantize": ANY,
        "weight_block_size": SIZES, "scale_fmt": ("float", "ue8m0", None),
        "expert_dtype": ("fp8", None), **_LEFT_OUT,
    },
    "fbgemm_fp8": {"activation_scale_ub": ANY, **_LEFT_OUT},
    "mxfp4": {"dequantize": ANY, **_LEFT_OUT},
    "awq": {
        "bits": (4,), "w_bit": (4,), "zero_point": (True,), "version": ("gemm", "GEMM", None),
        "backend": ("autoawq", "auto", "legacy_awq", None), "group_size": ANY, "q_group_size": ANY,
        **dict.fromkeys(("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"), ANY),
        **_LEFT_OUT,
    },
    "gptq": {
        "bits": (4,), "checkpoint_format": ("gptq", "gptq_v2", None),
        "format": ("gptq", "gptq_v2", None), "pack_dtype": ("int32", None),
        "is_marlin_format": (False, None), "rotation": (None,), "adapter": (None,),
        **dict.fromkeys(
            (
                *("group_size", "desc_act", "static_groups", "sym", "lm_head", "dynamic", "meta"),
                *("damp_percent", "damp_auto_increment", "true_sequential", "act_group_aware"),
                *("model_name_or_path", "model_file_base_name", "quantizer", "mse", "backend"),
                *("dataset", "tokenizer", "batch_size", "block_name_to_quantize", "model_seqlen"),
                *("cache_block_outputs", "max_input_length", "pad_token_id", "use_cuda_fp16"),
                *("module_name_preceding_first_block", "modules_in_block_to_quantize"),
                *("disable_exllama", "use_exllama", "exllama_config"),
            ),
            ANY,
        ),
    },
    "compressed-tensors": {
        **_GROUPS, "format": _PACKINGS, "quantization_status": ("compressed", None),
        "sparsity_config": ({}, None, {"format": "dense"}), "transform_config": ({}, None),
        **dict.fromkeys(("global_compression_ratio", "version"), ANY),
    },
    "modelopt": {
        **_GROUPS, "quant_algo": ("FP8", "NVFP4"), "group_size": (16, None),
        **dict.fromkeys(("producer", "exclude_modules", "kv_cache_quant_algo"), ANY),
    },
}  # fmt: skip
_HINT = "weights stored so are not decoded so far; take the model in another format"
# Scales of activations and of a cache, which some methods put beside the weights.
_NOT_OF_WEIGHTS = tuple(
    f".{name}"
    for name in (
        "input_scale",
        "input_global_scale",
        "output_scale",
        "q_scale",
        "k_scale",
        "v_scale",
    )
)


@dataclass(frozen=True)
class Settings:
    """`method`: "" where config.json names none. `block`: rows and columns that share a scale of
    FP8, where scales are a grid. `zeros_less`: by how much GPTQ's zero points are stored too low.
    `notes`: what is stated and not done, for people.
    """

    method: str = ""
    block: tuple[int, int] = (128, 128)
    zeros_less: int = 0
    notes: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether a tensor belongs to activations or a cache: both are computed as they are."""
        return bool(self.method) and name.endswith(_NOT_OF_WEIGHTS)


NO_SETTINGS = Settings()


def read_settings(fields: Mapping[str, object], file: str) -> tuple[Settings, list[Problem]]:
    """Of the fields of a config.json; or what is not understood, by its name."""
    stated = fields.get(FIELD) or {}
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if method is None:
        return NO_SETTINGS, []
    if not isinstance(method, str) or method not in METHODS or not isinstance(stated, dict):
        found = f"{FIELD}.quant_method = {spell(method)}"
        needed = " or ".join(map(spell, METHODS))
        return NO_SETTINGS, [Problem(file, None, found, needed, _HINT)]
    known = METHODS[method]
    if known is None:
        return Settings(method), []
    problems = [
        Problem(file, None, f"{FIELD}.{name} = {spell(value)}", needed, _HINT)
        for name, value, needed in _unknown(stated, {**known, "quant_method": ANY}, "")
    ]
    if problems:
        return NO_SETTINGS, problems
    sizes = set(_block_sizes(stated))
    if len(sizes) > 1:
        found = f"{FIELD}.config_groups with block_structure {show(sorted(sizes))}"
        return NO_SETTINGS, [Problem(file, None, found, "one size of blocks for all", _HINT)]
    block = next(iter(sizes), Settings.block)
    first = method == "gptq" and "gptq_v2" not in (
        stated.get("checkpoint_format"), stated.get("format")
    )  # fmt: skip
    return Settings(method, block, int(first), tuple(_notes(method, stated))), []


def _notes(method: str, stated: Mapping[str, Any]) -> Iterator[str]:
    groups = (stated.get("config_groups") or {}).values()
    activations = method in ("fp8", "fbgemm_fp8") or any(
        one and one.get("input_activations") for one in groups
    )
    if activations:
        yield "weights are read as stored; activations, which other programs quantize too, are not"
    if stated.get("kv_cache_scheme"):
        yield "kv_cache_scheme is not used: --kv says how keys and values are kept"


def _unknown(
    stated: Mapping[str, object], known: Mapping[str, Rule], path: str
) -> Iterator[tuple[str, object, str]]:
    """(field, value, what is needed) of what the rules do not allow."""
    for name, value in stated.items():
        where, rule = f"{path}{name}", known.get(name, ())
        if rule is ANY:
            continue
        if isinstance(rule, tuple):
            if not any(value == one and type(value) is type(one) for one in rule):
                yield where, value, " or ".join(map(spell, rule)) or "no such field"
        elif rule is SIZES:
            if value is not None and not _are_sizes(value):
                yield where, value, SIZES
        elif not isinstance(value, dict):
            if value is not None:
                yield where, value, "an object"
        elif rule is EACH_GROUP:
            yield from _unknown(value, dict.fromkeys(value, _GROUP), f"{where}.")
        else:
            yield from _unknown(value, rule, f"{where}.")


def _are_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(one) is int and 0 < one < 1 << 31 and one % 8 == 0 for one in value)
    )


def _block_sizes(stated: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """What is stated of them, once it is known to be right."""
    groups = stated.get("config_groups") or {}
    weights = [stated, *((one or {}).get("weights") or {} for one in groups.values())]
    for one in weights:
        for field in ("weight_block_size", "block_structure"):
            if _are_sizes(one.get(field)):
                yield one[field][0], one[field][1]
