"""Fields of config.json that `config.py` does not read: harmless, foreign, or unknown and listed.

Tokenizer and decoding fields that old releases of transformers wrote there are unknown here too:
`layersweep inspect` lists what is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

# They change no number of a forward pass: where a model comes from, what is returned, how it was
# trained (dropout, router noise and losses act in training alone), which dtype the file has (each
# tensor says its own), which row of the embedding is padding (it is read like any other).
HARMLESS = frozenset({
    *("_name_or_path", "name_or_path", "transformers_version", "model_type"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "chunk_size_feed_forward", "torchscript", "is_decoder"),
    *("attention_dropout", "router_jitter_noise", "router_aux_loss_coef", "initializer_range"),
    *("torch_dtype", "dtype", "pad_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
})  # fmt: skip

# They change the maths of other families, or of any: the values that say what a Mixtral does.
FOREIGN: Mapping[str, tuple[object, ...]] = {
    # biases (llama, qwen, phi)
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias"), (False,)),
    # parts of RoPE (glm, phi, gpt-neox), other positions (falcon, smollm3)
    **{"partial_rotary_factor": (1.0,), "rotary_pct": (1.0,), "alibi": (False,)},
    "no_rope_layers": ([],),
    # norms, caps and scales of attention (qwen3, gemma2, olmo, dbrx, granite), its kinds (llama4)
    **dict.fromkeys(("use_qk_norm", "qk_norm", "use_bidirectional_attention"), (False,)),
    **dict.fromkeys(("attn_logit_softcapping", "query_pre_attn_scalar", "clip_qkv"), ()),
    **dict.fromkeys(("attention_multiplier", "attention_chunk_size"), ()),
    # activations (gemma), scales of embedding, residual and logits (gemma2, granite, cohere)
    **{"hidden_activation": ("silu",), "swiglu_limit": (), "final_logit_softcapping": ()},
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "scale_emb"), (1.0,)),
    **dict.fromkeys(("logit_scale", "logits_scaling"), (1.0,)),
    # routing and shared experts (deepseek, glm4_moe, qwen_moe, ernie)
    **{"norm_topk_prob": (True,), "scoring_func": ("softmax",), "routed_scaling_factor": (1.0,)},
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "moe_layer_freq"), (1,)),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace"), (0,)),
    **{"shared_expert_intermediate_size": (0,), "mlp_only_layers": ([],)},
    # any family
    **{"per_layer_config": ({},), "pruned_heads": ({},), "compression_config": ({},)},
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False,)),
}


def foreign_fields(fields: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(field, what is needed) of the fields by which this is no plain Mixtral."""
    for name, plain in FOREIGN.items():
        value = fields.get(name)
        if value is not None and not any(value == one for one in plain):
            yield name, " or ".join(["nothing", *map(repr, plain)])


def unused_fields(fields: Mapping[str, object], read: Iterable[str]) -> tuple[str, ...]:
    """Fields with a value that are neither `read`, nor harmless, nor held against FOREIGN."""
    known = HARMLESS | FOREIGN.keys() | set(read)
    return tuple(name for name in fields if name not in known and fields[name] is not None)
