"""The published shapes behind `random:PRESET`, checked against the parameter counts that were published with them."""

import pytest

from headway.models import presets
from headway.models.config import ModelError

PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "smollm2-135m": 134_515_008,
}


def test_every_preset_has_its_published_number_of_parameters():
    assert {name: presets.preset(name).num_parameters for name in presets.names()} == PUBLISHED


def test_presets_keep_what_a_parameter_count_cannot_show():
    llama = presets.preset("llama-3.2-1b")
    scaling = llama.rope_scaling
    assert (llama.rope_theta, llama.max_positions, llama.head_size) == (500000.0, 131072, 64)
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("llama3", 32.0, 8192)
    assert presets.preset("mistral-7b").windows == (4096,) * 32
    assert presets.preset("qwen2.5-0.5b").windows == (None,) * 24
    qwen3 = presets.preset("qwen3-0.6b")
    assert (qwen3.head_size, qwen3.q_size, qwen3.qk_norm) == (128, 2048, True)
    assert {presets.preset(name).dtype for name in presets.names()} == {"bfloat16"}


def test_only_random_models_are_presets():
    assert presets.parse(None) is None
    assert presets.parse("some/folder") is None
    assert presets.parse("random:SmolLM2-135M") == presets.preset("smollm2-135m")


def test_an_unknown_preset_is_answered_with_those_there_are():
    with pytest.raises(ModelError, match=r"no preset 'qwen9': choose from .*qwen2\.5-0\.5b.*smollm2-135m\.$"):
        presets.parse("random:qwen9")
