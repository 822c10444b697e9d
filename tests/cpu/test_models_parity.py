"""The plain forward pass against transformers, family by family, through the files that transformers saves."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headway.models import decoder, weights
from headway.models.config import read_config

LENGTH = 70  # more than twice yarn's original context, beyond llama3's, and many times the sliding windows


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 131, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def _ours(folder: Path, dtype: torch.dtype, tokens_BT: Tensor) -> Tensor:
    model = weights.load(folder, dtype)
    with torch.inference_mode():
        return model.head(decoder.forward(model, tokens_BT)).float()


@torch.inference_mode()
def test_every_family_gives_the_logits_of_transformers(family, tiny, tiny_folder):
    """Two sequences, longer than every window and every original context, in float32."""
    tokens = _tokens()
    expected = tiny(family)(tokens).logits
    assert expected.std() > 0.5, "logits too small for the tolerance to mean anything"
    torch.testing.assert_close(_ours(tiny_folder(family), torch.float32, tokens), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_bf16_errs_no_more_than_transformers_does(family, tiny, tiny_folder):
    """The two round at different places; against float32, ours may be off by at most twice what transformers is."""
    tokens = _tokens()
    exact = tiny(family)(tokens).logits
    reference = tiny(family, dtype=torch.bfloat16).to(torch.bfloat16)(tokens).logits.float()
    ours = _ours(tiny_folder(family), torch.bfloat16, tokens)
    rms_error = (ours - exact).square().mean().sqrt()
    assert rms_error <= 2 * (reference - exact).square().mean().sqrt()
    assert rms_error <= 0.1 * exact.std()


@pytest.mark.parametrize("family", ["llama3-scaled", "qwen2"])
def test_a_model_in_many_shards_is_the_same_model(family, tiny_folder):
    """transformers cuts the file into pieces and writes an index."""
    sharded = tiny_folder(family, shard="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, pieces = (weights.load(folder, torch.float32) for folder in (tiny_folder(family), sharded))
    assert whole.config == pieces.config
    for one, other in zip(_tensors(whole), _tensors(pieces), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("heads", [(2, 1), (6, 3), (7, 1), (8, 4)])
@torch.inference_mode()
def test_query_heads_share_key_value_heads_in_order(heads, tiny, tiny_folder):
    """Grouped-query attention at other ratios and head sizes than the families have."""
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 16 * heads[0]}
    tokens = _tokens()
    expected = tiny("qwen2-windows", **shape)(tokens).logits
    got = _ours(tiny_folder("qwen2-windows", **shape), torch.float32, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_both_spellings_of_the_rotary_settings_are_understood(family, tiny_folder, tmp_path):
    """Earlier releases of transformers write rope_theta, rope_scaling and torch_dtype instead of today's names."""
    folder = tiny_folder(family)
    fields = json.loads((folder / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    fields["torch_dtype"] = fields.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
    assert read_config(tmp_path) == read_config(folder)


def test_parameters_are_counted_as_transformers_counts_them(family, tiny, tiny_folder):
    assert read_config(tiny_folder(family)).num_parameters == tiny(family).num_parameters()


def test_the_pass_can_be_differentiated(tiny, tiny_folder):
    """Training uses the same pass: its gradients are those of transformers."""
    tokens = _tokens()[:, :20]
    oracle = tiny("qwen3", num_hidden_layers=2)
    oracle.zero_grad()
    oracle(tokens, labels=tokens).loss.backward()
    model = weights.load(tiny_folder("qwen3", num_hidden_layers=2), torch.float32)
    model.embedding_VE.requires_grad_()
    model.layers[0].down.weight.requires_grad_()
    logits = model.head(decoder.forward(model, tokens))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for ours, theirs in (
        (model.embedding_VE, oracle.model.embed_tokens.weight),
        (model.layers[0].down.weight, oracle.model.layers[0].mlp.down_proj.weight),
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3)


def _tensors(model: decoder.Decoder) -> list[Tensor]:
    flat = [model.embedding_VE, model.final_norm, model.head.weight]
    for layer in model.layers:
        flat += [layer.input_norm, layer.post_norm]
        flat += [
            tensor
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
            for tensor in linear
            if tensor is not None
        ]
    return flat
