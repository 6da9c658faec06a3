"""Published models as shapes: their config.json, and which of their weights are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from layersweep.families.names import Names
from layersweep.families.registry import describe
from layersweep.families.spec import Decoder
from layersweep.families.weights import BlockShape

QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float16",
}


@dataclass(frozen=True)
class PublishedShape:
    """`fields`: of config.json, as published. `packed_router`: NF4, as linear layers are, where
    the family's router was one when the model was quantized."""

    fields: Mapping[str, Any]
    packed_router: bool = False

    def with_layers(self, layers: int) -> PublishedShape:
        """The same with fewer layers."""
        changed: dict[str, Any] = {"num_hidden_layers": layers}
        if isinstance(types := self.fields.get("layer_types"), list):
            changed["layer_types"] = types[:layers]
        return self.with_fields(changed)

    def with_fields(self, changed: Mapping[str, Any]) -> PublishedShape:
        """The same with other values for some fields of config.json."""
        return replace(self, fields={**self.fields, **changed})

    def config_json(self) -> dict[str, Any]:
        return {
            **self.fields, "layersweep_synthetic": True, "torch_dtype": "float16",
            "quantization_config": QUANTIZATION,
        }  # fmt: skip

    @cached_property
    def _described(self) -> tuple[Decoder, Names]:
        found = describe(self.config_json(), "shape")
        assert found.decoder is not None and found.names is not None, found.problems
        return found.decoder, found.names

    @property
    def decoder(self) -> Decoder:
        return self._described[0]

    def stored_name(self, block: BlockShape, key: str) -> str:
        """The name that a published file has for a weight."""
        return self._described[1].bases(block, key)[0]

    def packs(self, block: BlockShape, key: str) -> bool:
        """Whether a weight is stored in 4 bits: what was a linear layer, but the head."""
        if key == "router":
            return self.packed_router
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
SHAPES = {"mixtral-8x7b": MIXTRAL_8X7B, "llama-3.1-8b": LLAMA_3_1_8B}
