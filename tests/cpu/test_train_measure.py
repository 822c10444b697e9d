"""Held-out losses and continuations of tiny decoders."""

import math

import pytest
import torch

from headway.models.config import DecoderConfig, parse_config
from headway.models.decoder import Decoder, Linear
from headway.train.data import Document
from headway.train.infill import Cut
from headway.train.measure import continuation, middle_loss, nats_per_target, plain_loss
from headway.train.objective import cross_entropy
from headway.train.parameters import initial_decoder, named_tensors
from headway.train.vocabulary import encode_texts, train_vocabulary

TOKENIZER = train_vocabulary(["def add(a, b):\n    return a + b\n"] * 9, 290)
SIZE = TOKENIZER.get_vocab_size()
CUT = Cut("def add(", "größe, b", "):\n    return b\n")


def config_of(max_positions: int) -> DecoderConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "max_position_embeddings": max_positions,
            "tie_word_embeddings": False,
        }
    )


@pytest.fixture(scope="module")
def model() -> Decoder:
    shaken = initial_decoder(config_of(max_positions=64), seed=1)
    with torch.no_grad():
        for number, tensor in enumerate(named_tensors(shaken).values()):
            tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    return shaken


def test_a_model_that_knows_nothing_has_the_loss_of_a_fair_die(model: Decoder) -> None:
    """A head of zeros: every token costs ln V, and a document of n tokens has n + 1 with its end."""
    blank = model._replace(head=Linear(torch.zeros_like(model.head.weight)))
    documents = [Document("a.py", "def add(a, b): ü\n"), Document("b.py", "return a")]
    loss = plain_loss(blank, TOKENIZER, documents)
    assert loss.num_tokens == sum(map(len, encode_texts(TOKENIZER, [d.text for d in documents]))) + 2
    assert loss.num_bytes == 18 + 8  # ü takes two
    assert loss.nats_per_token == pytest.approx(math.log(SIZE))
    assert loss.bits_per_byte == pytest.approx(loss.num_tokens * math.log2(SIZE) / 26)


def test_it_is_the_loss_that_training_minimizes(model: Decoder) -> None:
    """Within one window, the mean is the objective's own value."""
    tokens = torch.randint(0, SIZE, (50,), generator=torch.Generator().manual_seed(4))
    expected = cross_entropy(model, tokens.unsqueeze(0))
    torch.testing.assert_close(nats_per_target(model, tokens.tolist()).mean(), expected)


@pytest.mark.parametrize("length", [2, 64, 65, 66, 129, 200])
def test_every_token_is_a_target_once_whatever_the_length(model: Decoder, length: int) -> None:
    """Texts around the context's length: no target is lost at a window's edge, and each window starts afresh."""
    tokens = torch.randint(0, SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    nats = nats_per_target(model, tokens)
    assert len(nats) == length - 1
    for start in range(0, length - 1, 64):
        torch.testing.assert_close(nats[start : start + 64], nats_per_target(model, tokens[start : start + 65]))


@pytest.mark.parametrize("see_suffix", [True, False])
def test_the_middles_loss_is_of_the_middle_alone(model: Decoder, see_suffix: bool) -> None:
    """The counts are the middle's, an empty middle costs nothing, and the end of text is not among them."""
    loss = middle_loss(model, TOKENIZER, [CUT, Cut("a", "", "b")], see_suffix=see_suffix)
    [middle] = encode_texts(TOKENIZER, [CUT.middle])
    assert (loss.num_tokens, loss.num_bytes) == (len(middle), 10)


def test_only_with_the_suffix_in_sight_does_it_matter(model: Decoder) -> None:
    """Another suffix changes the loss in FIM order and no bit of the left-to-right one."""
    other = CUT._replace(suffix="):\n    return a\n")
    seen = [middle_loss(model, TOKENIZER, [each], see_suffix=True).nats for each in (CUT, other)]
    unseen = [middle_loss(model, TOKENIZER, [each], see_suffix=False).nats for each in (CUT, other)]
    assert seen[0] != seen[1]
    assert unseen[0] == unseen[1]


def test_a_greedy_continuation_is_the_best_token_each_time(model: Decoder) -> None:
    """Ten tokens: the same as asking step by step, and the same every time."""
    text = continuation(model, TOKENIZER, "def add", max_tokens=10)
    assert text == continuation(model, TOKENIZER, "def add", max_tokens=10, seed=9)
    sampled = {continuation(model, TOKENIZER, "def add", max_tokens=10, temperature=2.0, seed=n) for n in range(4)}
    assert len(sampled) == 4


def test_the_end_of_text_ends_a_continuation(model: Decoder) -> None:
    """A head that says the end whatever it sees: nothing is written, and no sentinel leaks into the text."""
    end = torch.zeros(SIZE)
    end[TOKENIZER.token_to_id("<|endoftext|>")] = 1.0
    finished = model._replace(head=Linear(torch.zeros_like(model.head.weight), end))
    assert continuation(finished, TOKENIZER, "def", max_tokens=10) == ""
