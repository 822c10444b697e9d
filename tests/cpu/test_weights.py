"""Checkpoints that are whole load exactly; damaged, foreign or incomplete ones are refused with one sentence."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.models import weights
from headway.models.config import ModelError, parse_config
from headway.models.layers import rope_table
from headway.models.presets import preset

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A model in one file, to be damaged."""
    return Path(shutil.copytree(tiny_folder("qwen2"), tmp_path / "whole"))


@pytest.fixture
def sharded(tiny_folder, tmp_path) -> Path:
    """The same in several files with an index, to be damaged."""
    return Path(shutil.copytree(tiny_folder("qwen2", shard="40KB"), tmp_path / "sharded"))


def _refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        weights.load(folder, torch.float32)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(".")


def _rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Save the file again with some tensors replaced, added, or (None) left out; __ stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changed.items():
        tensors[name.replace("__", ".")] = tensor
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_queries_keys_and_values_are_stacked_in_that_order(folder):
    stored = load_file(folder / "model.safetensors")
    layer = weights.load(folder, torch.float32).layers[1]
    at = "model.layers.1."
    parts = [stored[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv.weight, torch.cat(parts))
    assert torch.equal(layer.qkv.bias, torch.cat([stored[f"{at}self_attn.{name}_proj.bias"] for name in "qkv"]))
    parts = [stored[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(layer.gate_up.weight, torch.cat(parts))
    assert layer.o.bias is None


def test_a_tied_head_is_the_embedding_itself_and_an_untied_one_is_not(tiny_folder):
    tied = weights.load(tiny_folder("qwen2"), torch.float32)
    assert tied.head.weight is tied.embedding_VE
    untied = weights.load(tiny_folder("llama2"), torch.float32)
    assert not torch.equal(untied.head.weight, untied.embedding_VE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_cast_from_what_is_stored_to_what_is_asked(dtype, folder):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    stored = tensors["model.layers.0.mlp.down_proj.weight"]
    for wanted in (torch.bfloat16, torch.float32):
        model = weights.load(folder, wanted)
        assert {model.dtype, model.layers[0].down.weight.dtype, model.final_norm.dtype} == {wanted}
        assert torch.equal(model.layers[0].down.weight, stored.to(wanted))
    assert model.rope.dtype == torch.float32


def test_a_loaded_model_no_longer_needs_its_file(folder):
    """The mapping is copied from: overwriting or removing the file does not change a served model."""
    model = weights.load(folder, torch.float32)
    before = model.layers[0].down.weight.clone()
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    assert torch.equal(model.layers[0].down.weight, before)


def test_the_rotary_table_is_as_long_as_is_asked(folder):
    config = weights.load(folder, torch.float32).config
    assert len(weights.load(folder, torch.float32).rope) == 512
    model = weights.load(folder, torch.float32, num_positions=100)
    assert torch.equal(model.rope, rope_table(config, 512)[:100])


def test_what_old_releases_stored_besides_is_no_hindrance(folder):
    """A tied head stored again, and the rotary frequencies as a buffer."""
    tied = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    _rewrite(folder, lm_head__weight=tied, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert weights.load(folder, torch.float32).config.tie_embeddings


def test_any_name_will_do_for_the_only_file(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    weights.load(folder, torch.float32)
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    _refused(folder, rf"2 safetensors files but no {INDEX}: download the index")


def test_a_missing_tensor_is_named(folder):
    _rewrite(folder, model__layers__2__mlp__up_proj__weight=None)
    _refused(folder, r"lack the tensor model\.layers\.2\.mlp\.up_proj\.weight: download")


def test_an_untied_model_without_a_head_is_incomplete(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder("llama2"), tmp_path / "whole"))
    _rewrite(folder, lm_head__weight=None)
    _refused(folder, r"lack the tensor lm_head\.weight")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    _rewrite(folder, model__norm__weight=torch.ones(55))
    _refused(folder, r"model\.norm\.weight in .* has the shape \(55,\), config\.json says \(56,\)")


def test_a_tensor_without_a_place_means_another_model(folder):
    """A bias that config.json does not mention would silently be left out."""
    _rewrite(folder, model__layers__0__self_attn__o_proj__bias=torch.ones(56))
    _refused(folder, r"hold model\.layers\.0\.self_attn\.o_proj\.bias, for which config\.json has no place")


def test_quantized_weights_are_refused_by_their_dtype(folder):
    _rewrite(folder, model__norm__weight=torch.ones(56, dtype=torch.int8))
    _refused(folder, "stored as I8: give the original float32, bfloat16 or float16 weights")


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_download_that_was_cut_short_is_damaged(keep, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    _refused(folder, r"model\.safetensors is damaged .*: download it again")


def test_noise_is_not_a_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"noise" * 100)
    _refused(folder, "is damaged")


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    _refused(sharded, f"lacks {shard.name}, which its index names: download it again")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "not an index of safetensors files"),
        ('["weight_map"]', "not an index of safetensors files"),
        ('{"weight_map": {"a": ["b"]}}', "not an index of safetensors files"),
        ('{"weight_map": {}}', "must name files in its own folder"),
        ('{"weight_map": {"a": "../../outside.safetensors"}}', "must name files in its own folder"),
        ('{"weight_map": {"a": 3}}', "must name files in its own folder"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(index, says, sharded):
    (sharded / INDEX).write_text(index)
    _refused(sharded, says)


def test_pickles_are_never_opened(folder):
    """The old format can run code when it is read."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    _refused(folder, r"pytorch_model\.bin in .* is a pickle, which is never opened: convert it to safetensors")


def test_a_folder_without_weights_says_so(folder):
    (folder / "model.safetensors").unlink()
    _refused(folder, r"holds no \*\.safetensors file: download the model's weights")


def test_a_config_of_another_size_is_caught_before_anything_is_copied(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 4, "layer_types": None}))
    _refused(folder, r"lack the tensor model\.layers\.3\.")


# Random weights

SMALL = replace(preset("qwen2.5-0.5b"), num_layers=2, windows=(None, None), vocab_size=5000)


def test_the_same_seed_gives_the_same_weights_whatever_the_threads():
    """Two results from machines with different numbers of cores must be comparable."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weights.random_decoder(SMALL, 3, torch.float32)
        torch.set_num_threads(2)
        two = weights.random_decoder(SMALL, 3, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.embedding_VE, two.embedding_VE)
    assert torch.equal(one.layers[1].down.weight, two.layers[1].down.weight)
    other = weights.random_decoder(SMALL, 4, torch.float32)
    assert not torch.equal(one.embedding_VE, other.embedding_VE)


def test_the_dtype_only_rounds_random_weights():
    exact = weights.random_decoder(SMALL, 3, torch.float32)
    rounded = weights.random_decoder(SMALL, 3, torch.bfloat16)
    assert torch.equal(exact.layers[1].gate_up.weight.bfloat16(), rounded.layers[1].gate_up.weight)
    assert rounded.dtype == torch.bfloat16


def test_random_weights_are_scaled_as_a_fresh_model_is():
    """Deviation 0.02 and no pattern; norms one; biases, which Qwen2 has, zero."""
    model = weights.random_decoder(SMALL, 0, torch.float32)
    matrix = model.layers[0].gate_up.weight
    assert matrix.mean().abs() < 1e-4
    assert matrix.std().item() == pytest.approx(0.02, rel=0.01)
    assert matrix.unique().numel() > 0.5 * matrix.numel()
    assert torch.equal(model.layers[1].post_norm, torch.ones(896))
    assert torch.equal(model.layers[1].qkv.bias, torch.zeros(896 + 2 * 128))
    assert model.head.weight is model.embedding_VE


def test_a_random_model_has_a_place_for_every_tensor_of_its_family(family, tiny_folder):
    """Loaded or random, the two have the same parts of the same shapes."""
    loaded = weights.load(tiny_folder(family), torch.float32)
    random = weights.random_decoder(loaded.config, 0, torch.float32)
    assert _shapes(random) == _shapes(loaded)


def _shapes(part: object) -> object:
    if isinstance(part, torch.Tensor):
        return part.shape
    return tuple(map(_shapes, part)) if isinstance(part, tuple) else None


def test_tensor_names_are_those_that_transformers_saves(family, tiny_folder):
    folder = tiny_folder(family)
    shapes = weights.tensor_shapes(parse_config(json.loads((folder / "config.json").read_text())))
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shapes == stored


# The dtype


def test_weights_stored_in_float32_are_computed_in_float32():
    assert weights.choose_dtype("float32", "cpu") == (
        torch.float32,
        "float32, because the weights are stored as float32",
    )


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ([0.4, 0.7], torch.bfloat16),  # hardware for it
        ([0.5, 1.1], torch.bfloat16),  # a little slower by token, twice as fast by prompt
        ([9.0, 1.5], torch.float32),  # emulated
        ([2.0, 0.6], torch.float32),
    ],
)
def test_half_precision_is_computed_in_bf16_only_where_that_is_faster(stored, ratios, chosen, monkeypatch):
    """The machine's answer is played by a list: first for many rows, then for one."""
    answers = iter(ratios)
    monkeypatch.setattr(weights, "_bf16_ratio", lambda **_: next(answers))
    dtype, reason = weights.choose_dtype(stored, "cpu")
    assert dtype == chosen
    assert reason.startswith(str(chosen).removeprefix("torch."))
    assert f"{ratios[0]:.2f} (prefill) and {ratios[1]:.2f} (decode)" in reason


def test_where_it_is_compiled_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(weights, "_bf16_ratio", lambda **_: pytest.fail("measured"))
    assert weights.choose_dtype("float16", "cpu", is_compiled=True)[0] is torch.bfloat16
    assert weights.choose_dtype("float32", "cpu", is_compiled=True)[0] is torch.float32


def test_the_measurement_runs_on_this_machine():
    dtype, reason = weights.choose_dtype("bfloat16", "cpu")
    assert reason.startswith(str(dtype).removeprefix("torch."))
