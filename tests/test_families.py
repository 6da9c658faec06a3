"""Every family of decoders beside transformers: float32 losses of windows and of a needle.

make test-slow      all the variants of tests/families, with their fields changed
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families.checks import TOLERANCE, Subject, complaints, exact, generated, nf4, through_arm
from families.dense import DENSE
from families.hybrids import HYBRIDS
from families.oracle import effects
from families.small import write_json
from families.table import CHANGED, CORE, REFUSED, TINY, parameters
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layersweep.errors import InputError
from layersweep.families.registry import describe
from layersweep.sweep.model import load

ATTENTION_KINDS = {
    "full": "qwen2",
    "window": "mistral",
    "softcap": "gemma2",
    "sinks": "gpt_oss",
    "q and k norm": "qwen3",
    "part of the head": "glm4",
    "two thetas": "gemma3_text",
    "latent": "deepseek_v2",
    "latent as wide as its rotary key": "glm4_moe_lite",
}
CACHES = {
    "a state dropped between two calls": "jamba",
    "positions counted anew": "bamba",
    "attention shared by layers": "zamba2",
    "the first part of a head turned apart": "phi",
    "a norm after RoPE": "nanochat",
    "a norm after RoPE, with weights": "hunyuan_v1_moe",
}
# Not run on tiny models: what they are. tools/measure_families.py tries them, too.
ENCODERS = "an encoder, or a decoder that reads one"
OTHER_KINDS = {
    ENCODERS: {
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot"),
        *("blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian"),
        *("mbart", "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "reformer"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr"),
        *("whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
    },
    "more than text": {
        *("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git"),
        *("gemma4_assistant", "gemma4_unified_assistant", "got_ocr2", "llama4", "mllama"),
        *("moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"),
        *("qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    },
    "a decoder that nobody has asked for": {
        *("beam", "blt", "cohere_compass_text", "cpmant", "ctrl", "deepseek_v4", "dory"),
        *("dots3_note_text", "gpt-sw3", "hrm_text", "hy_v4", "inkling2_loop_text"),
        *("inkling2_text", "inkling_text", "modernbert-decoder", "qwen4_exp_text", "rwkv"),
        *("xlstm", "zamba"),
    },
}


changing = pytest.mark.parametrize(
    "family", parameters({**DENSE, **HYBRIDS}, CHANGED), indirect=True
)
each = pytest.mark.parametrize("family", parameters({**DENSE, **HYBRIDS}), indirect=True)
kinds = pytest.mark.parametrize(
    "family", ATTENTION_KINDS.values(), ids=ATTENTION_KINDS, indirect=True
)


@each
def test_losses_equal_transformers(family: Subject) -> None:
    assert exact(family).largest < TOLERANCE


@pytest.mark.parametrize("family", parameters(HYBRIDS), indirect=True)
def test_linear_layers_as_nf4(family: Subject) -> None:
    assert nf4(family) < TOLERANCE


@changing
def test_a_changed_field_moves_the_losses_as_transformers_do(family: Subject) -> None:
    assert complaints(family) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", CACHES.values(), ids=CACHES, indirect=True)
def test_an_arm_equals_caches_that_are_unlike_others(family: Subject) -> None:
    difference, effect = through_arm(family, "lloyd:K3V2")
    assert difference < TOLERANCE
    assert effect > 1e-3


@kinds
@pytest.mark.parametrize("arm", ["lloyd:K3V2", "e8:K4V2"])
def test_an_arm_equals_transformers_with_an_overwritten_cache(family: Subject, arm: str) -> None:
    difference, effect = through_arm(family, arm)
    assert difference < TOLERANCE
    assert effect > 1e-3


@kinds
def test_a_token_at_a_time_equals_transformers(family: Subject) -> None:
    assert generated(family) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY, indirect=True)
def test_every_tensor_moves_the_losses_of_transformers(family: Subject) -> None:
    """A tensor that moves nothing could be left out, or read wrongly, and no test would see it."""
    unseen = [name for name, moved in effects(family.model).items() if moved < TOLERANCE]
    assert [name for name in unseen if not name.endswith(family.tiny.still)] == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_run_is_refused_with_its_reason(model_type: str) -> None:
    fields = TINY[model_type].config().to_dict()
    (problem,) = describe(fields, "config.json").problems
    assert REFUSED[model_type] in problem.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(OTHER_KINDS[ENCODERS]))
def test_an_encoder_is_refused_by_its_name(model_type: str, tmp_path: Path) -> None:
    fields = CONFIG_MAPPING[model_type]().to_dict()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    write_json(tmp_path, fields | {"architectures": [architecture]})
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{model_type}|{architecture}"):
        load(str(tmp_path), device="cpu")


def test_every_model_type_of_the_installed_transformers_has_been_looked_at() -> None:
    """A new one: try `python tools/measure_families.py TYPE`, then add it to a table."""
    seen = {tiny.model_type for tiny in TINY.values()}.union(*OTHER_KINDS.values())
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - seen == set()
    assert len({TINY[name].model_type for name in CORE}) >= 30
