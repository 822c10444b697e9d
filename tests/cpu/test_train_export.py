"""A trained decoder saved as a Hugging Face folder, read back by transformers and by this project."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headway.models.config import DecoderConfig, parse_config, read_config
from headway.models.decoder import Decoder, forward
from headway.train.export import save_folder
from headway.train.parameters import initial_decoder, named_tensors
from headway.train.vocabulary import train_vocabulary

TOKENIZER = train_vocabulary(["def add(a, b):\n    return a + b\n"], 280)
FAMILIES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def config_of(family: str, **fields: Any) -> DecoderConfig:
    shape = {
        "architectures": [family],
        "vocab_size": TOKENIZER.get_vocab_size(),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    return parse_config(shape | fields)


def shaken(config: DecoderConfig) -> Decoder:
    """A decoder in which no weight is zero or one, so that no missing part can hide."""
    model = initial_decoder(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in named_tensors(model).values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def save(folder: Path, model: Decoder, dtype: torch.dtype = torch.float32) -> None:
    save_folder(
        folder, model, TOKENIZER, end_of_text="<|endoftext|>", pad="<|fim_pad|>",
        generation={"do_sample": True, "temperature": 0.5}, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path: Path, family: str, tied: bool) -> None:
    """Every family the project serves can be trained and handed on: fp32 logits agree."""
    model = shaken(config_of(family, tie_word_embeddings=tied))
    save(tmp_path, model)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model.head(forward(model, tokens))
        theirs = oracle(input_ids=tokens).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_comes_back(tmp_path: Path, family: str) -> None:
    """What this project reads from the folder is what was saved."""
    config = config_of(family, dtype="bfloat16")
    save(tmp_path, initial_decoder(config, seed=0), dtype=torch.bfloat16)
    assert read_config(tmp_path) == config


def test_the_tokenizer_comes_back_with_its_template(tmp_path: Path) -> None:
    """transformers loads the tokenizer: same tokens, ends known, and messages simply joined."""
    save(tmp_path, initial_decoder(config_of("LlamaForCausalLM"), seed=0))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def größe(x):\n    return '🙂' + x\n"
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|fim_pad|>")
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "def f():"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "import os\ndef f():"
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.5


@pytest.mark.parametrize("window", [None, 16])
def test_mistrals_window_is_kept(tmp_path: Path, window: int | None) -> None:
    """With a window and without one: silence in the file would mean 4096."""
    config = config_of("MistralForCausalLM", sliding_window=window, dtype="float32")
    save(tmp_path, initial_decoder(config, seed=0))
    assert read_config(tmp_path).windows == (window, window)


def test_what_the_folder_could_not_say_is_refused(tmp_path: Path) -> None:
    """Windows of some layers alone: saving the model without them would make another one of it."""
    fields = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    config = config_of("Qwen2ForCausalLM", **fields)
    with pytest.raises(ValueError, match="Only Mistral's sliding window"):
        save(tmp_path, initial_decoder(config, seed=0))
