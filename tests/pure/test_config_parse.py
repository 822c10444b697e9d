"""config.json in, a DecoderConfig out, or one sentence that says what to do. No model is ever made here."""

import json
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headway.models.config import DecoderConfig, ModelError, parse_config, read_config

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 56,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "sliding_window": 128,
    "max_window_layers": 3,
    "eos_token_id": 7,
}
LLAMA = QWEN2 | {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"]}


def _parse(fields: dict, **changes: object) -> DecoderConfig:
    return parse_config(fields | changes)


def test_reading_a_shape_needs_no_torch():
    """The door reads config.json to know the context; it must stay light."""
    code = "import sys; from headway.models import config, locate, presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_family_has_its_own_biases_and_norms():
    assert (_parse(QWEN2).qkv_bias, _parse(QWEN2).o_bias, _parse(QWEN2).qk_norm) == (True, False, False)
    assert (_parse(QWEN3).qkv_bias, _parse(QWEN3).o_bias, _parse(QWEN3).qk_norm) == (False, False, True)
    assert (_parse(LLAMA).qkv_bias, _parse(LLAMA).mlp_bias) == (False, False)
    biased = _parse(LLAMA, attention_bias=True, mlp_bias=True)
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, True)


def test_a_qwen_uses_its_window_only_when_told_to():
    """Published Qwen configs name a window that is switched off."""
    assert _parse(QWEN2).windows == (None,) * 4
    assert _parse(QWEN2, use_sliding_window=True).windows == (None, None, None, 128)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert _parse(QWEN2, use_sliding_window=True, layer_types=kinds).windows == (128, None, None, 128)


def test_a_mistral_uses_its_window_everywhere_unless_it_is_null():
    assert _parse(MISTRAL).windows == (128,) * 4
    assert _parse(MISTRAL, sliding_window=None).windows == (None,) * 4
    without = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    assert parse_config(without).windows == (4096,) * 4, "transformers' default for this family"
    assert _parse(LLAMA).windows == (None,) * 4, "a Llama has no windows"


def test_head_size_is_given_or_derived_or_the_familys():
    assert _parse(LLAMA).head_size == 16
    assert _parse(LLAMA, head_dim=32).head_size == 32
    assert _parse(LLAMA, head_dim=None).head_size == 16
    assert _parse(QWEN3).head_size == 128


def test_yarn_stretches_the_context():
    """The published recipe adds yarn to a config whose max_position_embeddings are still the short ones."""
    config = _parse(QWEN2, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    assert config.max_positions == 2048
    assert config.rope_scaling.attention_factor == pytest.approx(1.1386, abs=1e-4)


def test_yarns_attention_factor_may_be_given_in_two_ways():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert _parse(QWEN2, rope_parameters=yarn | {"attention_factor": 0.5}).rope_scaling.attention_factor == 0.5
    equal = _parse(QWEN2, rope_parameters=yarn | {"mscale": 0.7, "mscale_all_dim": 0.7})
    assert equal.rope_scaling.attention_factor == 1.0


def test_every_way_to_end_a_sequence_is_known(tmp_path):
    """Instruction-tuned models name more end tokens in generation_config.json than in config.json."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert read_config(tmp_path).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert read_config(tmp_path).eos_ids == (7, 9)
    assert _parse(QWEN2, eos_token_id=None).eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported: Headway serves Llama, Mistral"),
        ({"architectures": None}, "names no architecture"),
        ({"quantization_config": {"bits": 4}}, "quantized: give the original"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of the linear rope scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of the llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "share 3 key-value heads evenly"),
        ({"head_dim": 15}, "must be even"),
        ({"vocab_size": "many"}, "vocab_size as 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers as 0"),
        ({"num_attention_heads": 0}, "wrong type"),
        ({"rope_theta": [1]}, "wrong type"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "for every layer"),
        ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window that is not a positive"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_sentence(changes, says):
    with pytest.raises(ModelError, match=says) as refused:
        _parse(QWEN2, **changes)
    _is_one_sentence(str(refused.value))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_missing_field_is_named(name):
    with pytest.raises(ModelError, match=f"lacks the field '{name}': download"):
        parse_config({key: value for key, value in QWEN2.items() if key != name})


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "\x00"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_broken_file_is_named(file, content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file} .*download the model again"):
        read_config(tmp_path)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json: give the folder of a Hugging Face model"):
        read_config(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5000) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["factor", "rope_type"]), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*QWEN2, "rope_scaling", "head_dim", "layer_types"]), _JSON, max_size=3))
@example({"eos_token_id": float("inf")})
@example({"max_position_embeddings": float("inf")})
def test_whatever_stands_in_a_field_the_answer_is_a_shape_or_a_sentence(changes):
    try:
        config = _parse(QWEN2, use_sliding_window=True, **changes)
    except ModelError:
        return
    assert len(config.windows) == config.num_layers


def _is_one_sentence(text: str) -> None:
    assert text.endswith(".")
    assert "\n" not in text
