"""One field of config.json at a time set to another value: what each field is, by its name.

A field is SHAPE (tensors would not fit), INERT (no forward pass reads it), or has a rule in
OTHER. A field that is none of them fails the test that lists them, so that a field of a new
release is looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ATTENTION = ("sliding_attention", "full_attention", "chunked_attention")

LENGTH = "max_position_embeddings"  # takes part in two kinds of RoPE, else it is only a limit

Fields = Mapping[str, Any]


def times(factor: float) -> Callable[[Any], Any]:
    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(one) for one in value]
        return type(value)(value * factor)

    return scaled


def to(value: object) -> Callable[[Any], Any]:
    return lambda old: value


def halved(count: int) -> int:
    """Of groups, where there are several."""
    return max(1, count // 2)


def either(one: str, other: str) -> Callable[[str], str]:
    return lambda old: other if old == one else one


def flipped(value: Any) -> Any:
    return not value


def turned(values: list[Any]) -> list[Any]:
    return values[1:] + values[:1]


def turned_windows(kinds: list[str]) -> list[str]:
    """Layers that see a window and layers that see everything have the same weights."""
    return turned(kinds) if all(kind in ATTENTION for kind in kinds) else kinds


def other_activation(name: str) -> str:
    return "gelu" if name in ("silu", "swish") else "silu"


MORE, LESS = times(1.4), times(0.6)
EPS = to(0.3)

OTHER: Mapping[str, Callable[[Any], Any]] = {
    # positions
    LENGTH: times(0.5),
    "rope_theta": times(0.05),
    "llama_4_scaling_beta": times(3.0),
    "rope_local_base_freq": times(0.05),
    "partial_rotary_factor": times(0.5),
    "rotary_dim": times(0.5),
    "rope_interleave": flipped,
    "factor": MORE,
    "low_freq_factor": times(3.0),
    "high_freq_factor": LESS,
    "original_max_position_embeddings": times(0.25),
    "beta_fast": times(0.1),
    "beta_slow": times(3.0),
    "mscale": MORE,
    "mscale_all_dim": MORE,
    "short_factor": MORE,
    "long_factor": MORE,
    "truncate": flipped,
    "no_rope_layers": turned,
    "layer_rope_theta": times(0.05),
    "alibi": flipped,
    "alibi_bias_max": times(0.5),
    # what attention sees
    "sliding_window": times(2.0),
    "attention_window_size": times(2.0),
    "window_size": times(2.0),
    "local_attention": times(2.0),
    "attention_chunk_size": times(1.5),
    "keep_window_size": times(0.005),
    "index_topk": times(2.0),
    "index_block_size": times(0.1),
    "index_topk_blocks": times(0.1),
    "index_local_blocks": times(2.0),
    "layer_types": turned_windows,
    "attention_layers": turned,
    # scores
    "query_pre_attn_scalar": MORE,
    "attn_logit_softcapping": LESS,
    "attention_multiplier": MORE,
    "key_multiplier": MORE,
    "clip_qkv": LESS,
    "attn_temperature_tuning": flipped,
    "floor_scale": times(0.5),
    "attn_scale": MORE,
    "scale_attn_weights": flipped,
    "scale_attn_by_inverse_layer_idx": flipped,
    "attention_value_scale": MORE,
    # norms and activations
    "rms_norm_eps": EPS,
    "layer_norm_eps": EPS,
    "layer_norm_epsilon": EPS,
    "norm_epsilon": EPS,
    "norm_eps": EPS,
    "mixer_rms_eps": EPS,
    "moe_norm_min": EPS,
    "hidden_act": other_activation,
    "hidden_activation": other_activation,
    "activation_function": other_activation,
    "afn": other_activation,
    "activation": other_activation,
    "mlp_hidden_act": other_activation,
    "mamba_hidden_act": other_activation,
    "hidden_mamba_act": other_activation,
    "swiglu_limit": LESS,
    "swiglu_alpha": MORE,
    "use_parallel_residual": flipped,
    "apply_residual_connection_post_layernorm": flipped,
    # scales of embedding, residual and logits
    "embedding_multiplier": MORE,
    "residual_multiplier": MORE,
    "logits_scaling": MORE,
    "logit_scale": MORE,
    "lm_head_multiplier": MORE,
    "final_logit_softcapping": LESS,
    "logits_soft_cap": LESS,
    "scale_embedding": flipped,
    "scale_emb": MORE,
    "scale_depth": MORE,
    "dim_model_base": MORE,
    "mup_enabled": flipped,
    "attention_in_multiplier": MORE,
    "attention_out_multiplier": MORE,
    "ssm_in_multiplier": MORE,
    "ssm_out_multiplier": MORE,
    "ssm_multipliers": MORE,
    "mlp_multipliers": MORE,
    "full_attn_alpha_factor": MORE,
    "full_attn_beta_factor": MORE,
    "linear_attn_alpha_factor": MORE,
    "linear_attn_beta_factor": MORE,
    "mlp_alpha_factor": MORE,
    "mlp_beta_factor": MORE,
    # routing
    "num_experts_per_tok": times(1.5),
    "moe_k": times(1.5),
    "moe_topk": times(1.5),
    "num_experts_per_token": times(1.5),
    "top_k_experts": times(1.5),
    "moe_renormalize": flipped,
    "num_expert_group": halved,
    "moe_top_k": times(1.5),
    "norm_topk_prob": flipped,
    "moe_normalize_expert_weights": to(2.0),
    "n_group": halved,
    "topk_group": halved,
    "topk_method": lambda old: (
        "greedy" if old == "group_limited_greedy" else "group_limited_greedy"
    ),
    "routed_scaling_factor": MORE,
    "moe_routed_scaling_factor": MORE,
    "router_scaling_factor": MORE,
    "route_scale": MORE,
    "moe_router_logit_softcapping": to(1.0),
    "expert_selection_fn": either("softmax", "sigmoid"),
    "moe_apply_router_weight_on_input": flipped,
    "shared_expert_combination_strategy": either("average", "sum"),
    # linear attention and state spaces
    "time_step_limit": to([0.2, 0.6]),
    "kda_lower_bound": LESS,
    "kda_safe_gate": flipped,
    "altup_correct_scale": flipped,
    "activation_sparsity_pattern": lambda layers: [0.7 for _ in layers],
    "linear_allow_neg_eigval": flipped,
    "mamba_norm_before_gate": flipped,
}

SHAPE = frozenset({
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("tie_word_embeddings", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"),
    *("num_shared_experts", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "attention_bias", "mlp_bias", "use_bias", "qkv_bias"),
    *("bias", "use_qkv_bias", "attention_out_bias", "lm_head_bias", "use_qk_norm"),
    *("qk_layernorm", "first_k_dense_replace", "mlp_layer_types", "mlp_only_layers"),
    *("decoder_sparse_step", "moe_num_experts", "moe_num_shared_experts", "moe_layer_interval"),
    *("moe_layer_start_index", "moe_layer_end_index", "shared_intermediate_size"),
    *("num_dense_layers", "rope_type", "n_embd", "n_head", "n_layer", "n_inner", "n_positions"),
    *("n_ctx", "multi_query", "num_kv_heads", "new_decoder_architecture", "parallel_attn"),
    *("ffn_hidden_size", "ffn_dim", "word_embed_proj_dim", "num_ln_in_parallel_attn"),
    *("attn_layer_indices", "full_attn_idxs", "layers_block_type", "block_types", "num_heads"),
    *("num_layers", "kv_channels", "d_model", "n_heads", "n_layers", "max_seq_len"),
    *("kv_n_heads", "expansion_ratio", "linear_conv_kernel_dim", "linear_key_head_dim"),
    *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("interleave_moe_layer_step", "moe_layers", "intermediate_size_mlp", "zero_expert_num"),
    *("expert_ffn_hidden_size", "dense_intermediate_size", "output_vocab_size", "lru_width"),
    *("mamba_d_state", "mamba_d_conv", "mamba_d_head", "mamba_d_ssm", "mamba_expand"),
    *("mamba_n_groups", "mamba_n_heads", "mamba_num_heads", "mamba_head_dim", "mamba_dt_rank"),
    *("mamba_conv_bias", "mamba_proj_bias", "projectors_bias", "mamba_rms_norm", "conv_bias"),
    *("conv_L_cache", "conv_kernel", "conv1d_width", "use_conv_bias", "expand", "state_size"),
    *("ssm_state_size", "time_step_rank", "n_groups", "moe_shared_expert_intermediate_size"),
    *("moe_latent_size", "no_bias", "learned_pos_emb", "attn_layer_period", "attn_layer_offset"),
    *("expert_layer_period", "expert_layer_offset", "use_expert_bias", "norm_bias"),
    *("num_attention_heads_per_layer", "gating", "intermediate_multiple_size", "n_mamba_heads"),
    *("mamba_ngroups", "num_mem_blocks", "adapter_rank", "use_shared_attention_adapter"),
    *("add_bias_linear", "attention_hidden_size", "attention_head_dim", "use_mem_rope"),
    *("prefix_dense_intermediate_size", "prefix_dense_sliding_window_pattern", "enable_bias"),
    *("layer_norm_elementwise_affine", "do_layer_norm_before", "_remove_final_layer_norm"),
    *("moe_num_experts", "is_moe", "use_sandwich_norm", "use_attention_gate", "use_post_norm"),
    *("qk_ln", "attn_type", "prefix_lm", "mamba_headdim", "num_query_groups", "hybrid_layer_ids"),
    *("attention_k_eq_v", "enable_moe_block", "num_kv_shared_layers", "use_double_wide_mlp"),
    *("hidden_size_per_layer_input", "vocab_size_per_layer_input", "altup_active_idx"),
    *("altup_num_inputs", "laurel_rank", "attention_heads", "router_hidden_size", "cca_time0"),
    *("cca_time1", "linear_head_dim", "linear_num_heads", "short_conv_kernel_size"),
    *("gated_norm_rank", "layer_group_size", "indexer_types"),
    *("index_head_dim", "index_n_heads", "position_embedding_type", "add_cross_attention"),
})  # fmt: skip

INERT = frozenset({
    *("transformers_version", "dtype", "use_cache", "initializer_range", "pad_token_id"),
    *("bos_token_id", "eos_token_id", "eod_token_id", "sep_token_id", "attention_dropout"),
    *("output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "input_jitter_noise", "pretraining_tp", "hidden_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "residual_dropout"),
    *("embedding_dropout", "dropout", "layerdrop", "aux_loss_coef", "z_loss_coefficient"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "classifier_dropout", "init_std", "lambda_std_dev"),
    *("embed_dropout", "resid_dropout", "attn_pdrop", "is_decoder", "init_device"),
    *("num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "mtp_mlp_layer_types"),
    *("mtp_layers_block_type", "use_mamba_kernels", "use_mambapy", "use_associative_scan"),
    *("num_logits_to_keep", "chunk_size", "mamba_chunk_size", "block_size", "time_step_min"),
    *("time_step_max", "time_step_floor", "time_step_init_scheme", "rescale_prenorm_residual"),
    *("residual_in_fp32", "mamba_ssm_cache_dtype", "use_mem_eff_path", "w_init_variance_scale"),
    *("embedding_initializer_range", "linear_a_log_min", "linear_a_log_max", "linear_dt_min"),
    *("linear_dt_max", "linear_dt_init_floor", "moe_shared_expert_overlap", "tie_encoder_decoder"),
    *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "reorder_and_upcast_attn"),
    *("enable_moe_fp32_combine", "slow_but_exact", "block_multiple_of", "use_long_context"),
    *("block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "moe_loss_weight", "pooling"),
    # layer_types says it for each layer
    *("max_window_layers", "use_sliding_window", "sliding_window_pattern"),
    *("no_rope_layer_interval", "global_attn_every_n_layers", "full_attention_interval"),
    *("activation_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    *("decoder_start_token_id", "model_max_length", "mtp_loss_scaling_factor", "altup_coef_clip"),
    *("use_bidirectional_attention", "_sliding_window_pattern", "attention_types"),
    # of mamba's initialization
    *("time_step_scale", "final_w_init_variance_scale"),
    # rope_type in an older spelling
    "type",
    # of configurations inside configurations
    *("_name_or_path", "chunk_size_feed_forward", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "return_dict", "0", "1", "LABEL_0", "LABEL_1"),
    *("attn_impl", "attn_uses_sequence_id", "norm_type", "embedding_fraction", "name"),
})  # fmt: skip


def leaves(fields: Fields, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every field that is set, objects opened."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        elif value is not None:
            yield (*path, name), value


def changes(fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted field, all fields with another value there)."""
    stretched = any(value in ("dynamic", "longrope") for _, value in leaves(fields))
    for path, value in leaves(fields):
        rule = OTHER.get(path[-1])
        if rule is None or (path[-1] == LENGTH and not stretched):
            continue
        other = rule(value)
        if other != value:
            yield ".".join(path), _replaced(fields, path, other)


def unknown(fields: Fields) -> list[str]:
    """Fields that nobody has looked at."""
    seen = OTHER.keys() | SHAPE | INERT
    return [".".join(path) for path, _ in leaves(fields) if path[-1] not in seen]


def _replaced(fields: Fields, path: tuple[str, ...], value: object) -> dict[str, Any]:
    whole = copy.deepcopy(dict(fields))
    part = whole
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return whole
