"""GGUF's names of tensors as those that families know: "blk.3.attn_q.weight" is
"model.layers.3.self_attn.q_proj.weight"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from layersweep.checkpoint.header import StoredTensor
from layersweep.checkpoint.storage.latent import KEYS, VALUES
from layersweep.families.names import LAYERS

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# A layer's, without ".weight" or ".bias" on both sides, or with it on both.
USUAL = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_SANDWICHED = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OF_FAMILIES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "gemma2": _SANDWICHED,
    "gemma3_text": _SANDWICHED,
    "gpt_oss": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.router",
        "attn_sinks.weight": "self_attn.sinks",
    },
    "deepseek_v2": (
        _LATENT := {
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
            "attn_k_b.weight": f"self_attn.kv_b_proj.weight{KEYS}",
            "attn_v_b.weight": f"self_attn.kv_b_proj.weight{VALUES}",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
            "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        }
    ),
    "deepseek_v3": _LATENT,
}
# An expert's weights under the names of its family: {expert} is its number.
EXPERTS = {
    "mixtral": "block_sparse_moe.experts.{expert}.",
    "gpt_oss": "mlp.experts.{part}s.{expert}.",
}
USUAL_EXPERTS = "mlp.experts.{expert}."
_LAYER = re.compile(r"blk\.(\d{1,4})\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"ffn_(gate|up|down)(?:_exps|\.(\d{1,5}))")


def renamed(tensors: Mapping[str, StoredTensor], model_type: str) -> dict[str, StoredTensor]:
    """All tensors by the names of the family; each still has its own name, for messages. A tensor
    of all experts becomes one for each. What no table has keeps its name."""
    table = {**USUAL, **OF_FAMILIES.get(model_type, {})}
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        found.update(_renamed(name, tensor, table, model_type))
    return found


def original(name: str, model_type: str) -> str:
    """What GGUF calls a tensor that a family misses, for messages."""
    table = {**USUAL, **OF_FAMILIES.get(model_type, {})}
    base, _, end = name.rpartition(".")
    for ours, theirs in OUTSIDE.items():
        if base == theirs:
            return f"{ours}.{end}"
    if not name.startswith(LAYERS):
        return name
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    for ours, theirs in table.items():
        if rest in (theirs, f"{theirs}.{end}"):
            whole = ours.endswith((".weight", ".bias"))
            return f"blk.{layer}.{ours}" + ("" if whole else f".{end}")
    if part := re.search(r"\.(gate|up|down)_proj|\.w([123])\.", rest):
        which = part[1] or {"1": "gate", "2": "down", "3": "up"}[part[2]]
        return f"blk.{layer}.ffn_{which}_exps.{end}"
    return name


def _renamed(
    name: str, tensor: StoredTensor, table: Mapping[str, str], model_type: str
) -> Iterator[tuple[str, StoredTensor]]:
    base, _, end = name.rpartition(".")
    if base in OUTSIDE:
        yield f"{OUTSIDE[base]}.{end}", tensor
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    layer, own, end = match.groups()
    start = f"{LAYERS}{int(layer)}."
    expert = _EXPERT.fullmatch(own)
    if expert and expert[2]:
        yield start + _expert_name(model_type, expert[1], int(expert[2]), end), tensor
    elif expert and len(tensor.shape) > 1:
        for index in range(tensor.shape[0]):
            part = tensor.rows(index, 1).reshaped(tensor.shape[1:])
            part = replace(part, name=f"{name}[{index}]")
            yield start + _expert_name(model_type, expert[1], index, end), part
    else:
        whole, known = table.get(f"{own}.{end}"), table.get(own)
        if whole is not None:
            yield start + whole, tensor
        elif known is not None:
            yield f"{start}{known}.{end}", tensor
        else:
            yield name, tensor


def _expert_name(model_type: str, part: str, expert: int, end: str) -> str:
    folder = EXPERTS.get(model_type, USUAL_EXPERTS)
    last = "" if "{part}" in folder else f"{part}_proj."
    return folder.format(expert=expert, part=f"{part}_proj") + last + end
