"""Fields of config.json that a family does not read: harmless, foreign, or unknown and listed.

Tokenizer and decoding fields that old releases of transformers wrote there are unknown here too:
`layersweep inspect` lists what is not looked at.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

# They change no number of a forward pass: where a model comes from, what is returned, how it was
# trained (dropout, router noise and losses act in training alone), which dtype the file has (each
# tensor says its own), which row of the embedding is padding (it is read like any other).
HARMLESS = frozenset({
    *("_name_or_path", "name_or_path", "transformers_version"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "chunk_size_feed_forward", "torchscript", "is_decoder"),
    *("attention_dropout", "router_jitter_noise", "router_aux_loss_coef", "initializer_range"),
    *("pretraining_tp", "embd_pdrop", "resid_pdrop", "residual_dropout"),
    *("torch_dtype", "dtype", "pad_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
})  # fmt: skip

# They change the maths of some families: the values, beside null, with which the others are plain.
NOTHING, OFF, ONE, NONE_OF_THEM = (), (False,), (1,), (0,)
FOREIGN: Mapping[str, tuple[object, ...]] = {
    # biases: llama, qwen, phi
    "attention_bias": OFF,
    "mlp_bias": OFF,
    "qkv_bias": OFF,
    "use_bias": OFF,
    "bias": OFF,
    # part of a head under RoPE: glm, phi, gpt-neox; no RoPE: falcon, smollm3
    "partial_rotary_factor": ONE,
    "rotary_pct": ONE,
    "alibi": OFF,
    "no_rope_layers": ([],),
    # norms, caps and scale of attention: qwen3, olmo, gemma2, dbrx, granite; masks: llama4, gemma3
    "use_qk_norm": OFF,
    "qk_norm": OFF,
    "attn_logit_softcapping": NOTHING,
    "query_pre_attn_scalar": NOTHING,
    "clip_qkv": NOTHING,
    "attention_multiplier": NOTHING,
    "attention_chunk_size": NOTHING,
    "use_bidirectional_attention": OFF,
    # activations: gemma, gpt_oss
    "hidden_activation": NOTHING,
    "swiglu_limit": NOTHING,
    # scales and caps of embedding, residual and logits: granite, minicpm, cohere, gemma2
    "embedding_multiplier": ONE,
    "scale_emb": ONE,
    "residual_multiplier": ONE,
    "logit_scale": ONE,
    "logits_scaling": ONE,
    "final_logit_softcapping": NOTHING,
    # routing, dense layers and shared experts: deepseek, glm4_moe, qwen_moe, ernie
    "norm_topk_prob": (True,),
    "scoring_func": ("softmax",),
    "routed_scaling_factor": ONE,
    "n_group": ONE,
    "topk_group": ONE,
    "decoder_sparse_step": ONE,
    "moe_layer_freq": ONE,
    "first_k_dense_replace": NONE_OF_THEM,
    "mlp_only_layers": ([],),
    "n_shared_experts": NONE_OF_THEM,
    "num_shared_experts": NONE_OF_THEM,
    "shared_expert_intermediate_size": NONE_OF_THEM,
    # any family
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "compression_config": ({},),
    "is_encoder_decoder": OFF,
    "add_cross_attention": OFF,
}


def foreign_fields(
    fields: Mapping[str, object], read: Container[str]
) -> Iterator[tuple[str, tuple[object, ...]]]:
    """(field, the values it may have) of every field that is not `read` and not plain."""
    for name, plain in FOREIGN.items():
        value = None if name in read else fields.get(name)
        if value is not None and not any(value == one for one in plain):
            yield name, plain


def unused_fields(fields: Mapping[str, object], read: Iterable[str]) -> tuple[str, ...]:
    """Fields with a value that are neither `read`, nor harmless, nor held against FOREIGN."""
    known = HARMLESS | FOREIGN.keys() | set(read)
    return tuple(name for name in fields if name not in known and fields[name] is not None)
