"""Published models as shapes: their config.json, and which of their weights are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from layersweep.errors import InputError
from layersweep.families.names import LAYERS, Names
from layersweep.families.registry import describe
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape

if TYPE_CHECKING:
    import torch

Weights = Literal["nf4", "mxfp4", "fp8"]
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
}


SETTINGS: Mapping[Weights, Mapping[str, object]] = {
    "nf4": QUANTIZATION,
    "fp8": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    },
}  # fmt: skip


@dataclass(frozen=True)
class PublishedShape:
    """`fields`: of config.json, as published. `packed_router`: NF4, as linear layers are, where
    the family's router was one when the model was quantized. `weights`: how they are stored."""

    fields: Mapping[str, Any]
    packed_router: bool = False
    weights: Weights = "nf4"

    def with_layers(self, layers: int) -> PublishedShape:
        """The same with fewer layers."""
        changed: dict[str, Any] = {"num_hidden_layers": layers}
        if isinstance(types := self.fields.get("layer_types"), list):
            changed["layer_types"] = types[:layers]
        return self.with_fields(changed)

    def with_fields(self, changed: Mapping[str, Any]) -> PublishedShape:
        """The same with other values for some fields of config.json."""
        return replace(self, fields={**self.fields, **changed})

    def with_weights(self, weights: Weights) -> PublishedShape:
        """The same, stored so. Raises InputError where no model of the family is."""
        family = str(self.fields["model_type"])
        if (weights == "mxfp4") and family != "gpt_oss":
            raise InputError(f"--weights: found mxfp4 for {family}, needed nf4 or fp8",
                             hint="gpt-oss is published in MXFP4: --shape gpt-oss-20b")  # fmt: skip
        if weights == "fp8" and family == "gpt_oss":
            raise InputError("--weights: found fp8 for gpt_oss, needed nf4 or mxfp4",
                             hint="--weights mxfp4, as it is published")  # fmt: skip
        return replace(self, weights=weights)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""
        import torch

        return torch.float16 if self.weights == "nf4" else torch.bfloat16

    def config_json(self) -> dict[str, Any]:
        return {
            **self.fields, "layersweep_synthetic": True,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "quantization_config": SETTINGS[self.weights],
        }  # fmt: skip

    @cached_property
    def _described(self) -> tuple[Decoder, Names]:
        found = describe(self.config_json(), "shape")
        assert found.decoder is not None and isinstance(found.names, Names), found.problems
        return found.decoder, found.names

    @property
    def decoder(self) -> Decoder:
        return self._described[0]

    def stored_name(self, block: BlockShape, key: str) -> str:
        """The name that a published file has for a weight."""
        return self._described[1].bases(block, key)[0]

    def fused_name(self, block: BlockShape, key: str) -> str:
        """The name of the tensor that holds this weight of all experts of a layer."""
        wholes = (one for one in self._described[1].wholes if one.keys == (key,))
        whole = next(one for one in wholes if not one.transposed)
        return f"{LAYERS}{block.layer}.{whole.spellings[0]}"

    def packs(self, block: BlockShape, key: str) -> bool:
        """Whether a weight is quantized: what was a linear layer, but the head; in MXFP4, experts
        alone."""
        if key == "router":
            return self.packed_router and self.weights == "nf4"
        if self.weights == "mxfp4" and block.role != "expert":
            return False
        return key.endswith("_proj")

    def norm_weight(self, block: BlockShape, key: str) -> float:
        """The stored weight by which a norm scales by 1."""
        decoder = self.decoder
        if block.layer is None:
            return 1.0 - decoder.norm.offset
        norm = getattr(decoder.layers[block.layer], key, None)
        return 1.0 - (decoder.norm if norm is None else norm).offset


MIXTRAL_8X7B = PublishedShape(
    {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32_000,
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32_768,
        "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    },
    packed_router=True,
)  # fmt: skip
LLAMA_3_1_8B = PublishedShape(
    {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256,
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131_072,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 128_000, "eos_token_id": 128_001,
    },
)  # fmt: skip
MIXTRAL_8X22B = MIXTRAL_8X7B.with_fields(
    {
        "vocab_size": 32_768, "hidden_size": 6144, "intermediate_size": 16_384,
        "num_hidden_layers": 56, "num_attention_heads": 48, "max_position_embeddings": 65_536,
    }
)  # fmt: skip
QWEN3_30B_A3B = PublishedShape(
    {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151_936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
        "max_position_embeddings": 40_960, "max_window_layers": 48, "use_sliding_window": False,
        "sliding_window": None, "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 151_643, "eos_token_id": 151_645,
    },
)  # fmt: skip
GPT_OSS_20B = PublishedShape(
    {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201_088,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128,
        "attention_bias": True, "swiglu_limit": 7.0, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 150_000, "initial_context_length": 4096,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131_072, "tie_word_embeddings": False,
        "eos_token_id": 200_002,
    },
)  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B.with_fields(
    {
        "num_hidden_layers": 36, "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    }
)  # fmt: skip
GLM_4_5_AIR = PublishedShape(
    {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 151_552,
        "hidden_size": 4096, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True,
        "use_qk_norm": False, "n_routed_experts": 128, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": None,
        "max_position_embeddings": 131_072, "tie_word_embeddings": False,
        "eos_token_id": [151_329, 151_336, 151_338],
    },
)  # fmt: skip
DEEPSEEK_V2_LITE = PublishedShape(
    {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707,
            "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
        "attention_bias": False, "max_position_embeddings": 163_840, "tie_word_embeddings": False,
        "bos_token_id": 100_000, "eos_token_id": 100_001,
    },
)  # fmt: skip
DEEPSEEK_V3 = PublishedShape(
    {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        },
        "attention_bias": False, "max_position_embeddings": 163_840, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    },
)  # fmt: skip
SHAPES = {
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-8x22b": MIXTRAL_8X22B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": GPT_OSS_120B,
    "glm-4.5-air": GLM_4_5_AIR,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v3": DEEPSEEK_V3,
}
