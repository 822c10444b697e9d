"""The embedded model as it lies in the repository, and the recipe that made it."""

import importlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from headway import assets
from headway.models.decoder import Decoder, forward
from headway.models.weights import load
from headway.train.data import Corpus, Document, standard_library
from headway.train.judge import repeated_share
from headway.train.measure import continuation, plain_loss
from headway.train.vocabulary import encode_texts, sentinels_of

FOLDER = Path(assets.__file__).parent / "embedded"
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
UNSEEN = '''class Basket:
    """A basket of fruit with a price for each."""

    def __init__(self, prices=None):
        self.prices = dict(prices or {})

    def add(self, name, price):
        if price < 0:
            raise ValueError("price must not be negative")
        self.prices[name] = price

    def total(self):
        return sum(self.prices.values())
'''


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load(FOLDER, torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_it_is_small_enough_to_live_in_the_repository() -> None:
    """Under 20 MB in all, with its card."""
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 20e6
    assert "README.md" in sizes


def test_it_spells_any_text(tokenizer: Tokenizer) -> None:
    """Code, Chinese, emoji, control characters."""
    text = "def größe(x):\n\treturn '文字🙂\0\x7f' + x  # ½\r\n"
    [tokens] = encode_texts(tokenizer, [text])
    assert tokenizer.decode(tokens) == text
    assert sentinels_of(tokenizer) == (0, 1, 2, 3, 4)


def test_transformers_agrees_on_its_logits(model: Decoder, tokenizer: Tokenizer) -> None:
    """The same folder in the oracle, fp32."""
    oracle = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = torch.tensor([tokenizer.encode(UNSEEN).ids])
    with torch.no_grad():
        torch.testing.assert_close(model.head(forward(model, tokens)), oracle(tokens).logits, atol=1e-3, rtol=0)


def test_it_knows_python(model: Decoder, tokenizer: Tokenizer) -> None:
    """A class that it never saw costs far less than eight bits a byte, and less than its lines in another order."""
    lines = UNSEEN.splitlines(keepends=True)
    shuffled = "".join(lines[::-1])
    loss, worse = (plain_loss(model, tokenizer, [Document("basket.py", text)]) for text in (UNSEEN, shuffled))
    assert loss.bits_per_byte < 1.4
    assert worse.bits_per_byte > loss.bits_per_byte + 0.1


@pytest.mark.parametrize(
    "prompt", ["def fibonacci(n):", "def fibonacci(n):\n", "class Stack:\n    def push(self, item):\n"]
)
def test_it_continues_python_recognisably(model: Decoder, tokenizer: Tokenizer, prompt: str) -> None:
    """Greedy, 40 tokens: an indented body with Python's words in it, no sentinel and no loop of one line."""
    text = continuation(model, tokenizer, prompt, max_tokens=40)
    body = text.lstrip("\n")
    assert body.startswith("    ")
    assert any(word in text for word in ("return", "if ", "for ", "self.", "raise ", " = "))
    assert "<|" not in text
    assert repeated_share([text]) < 0.5


def test_the_recipe_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way with a dwarf: vocabulary, lessons with a stop in between, second run, export, card, result."""
    monkeypatch.syspath_prepend(RECIPES)
    made, report_of = importlib.import_module("embedded"), importlib.import_module("embedded_report")
    settings = made.Settings(
        vocab_size=512,
        hidden_size=128,
        num_layers=1,
        intermediate_size=64,
        lessons=(made.Lesson(2, 512, 1400, None, True), made.Lesson(1, 2048, 5000, 99, False)),
        loops=made.Lesson(1, 512, 1400, 99, False),
        warmup_steps=1,
        compiled=False,
    )
    documents = standard_library()
    corpus, run, asset = Corpus(tuple(documents[5:40]), tuple(documents[:2])), tmp_path / "run", tmp_path / "asset"
    tokenizer = made.vocabulary_of(settings, corpus, run)
    made.train_decoder(settings, corpus, tokenizer, run, stop_after=1)
    model, account = made.train_decoder(settings, corpus, made.vocabulary_of(settings, corpus, run), run)
    more = made.teach_to_leave_loops(settings, corpus, tokenizer, model, run / report_of.LOOPS)
    made.export(settings, model, tokenizer, asset)
    for name, value in {"TEMPERATURES": (0.0, 1.0), "NUM_FUNCTIONS": 2, "CONTINUED_TOKENS": 4}.items():
        monkeypatch.setattr(report_of, name, value)
    report = report_of.measure(corpus, account.plus(more), asset, run)
    assert report.account.num_tokens == 4 * 4096
    assert 3 < report.plain.nats_per_token < 6.3  # ln 512 = 6.2
    assert f"{report.plain.bits_per_byte:.3f}" in report_of.card(settings, report)
    assert "## Trials" in report_of.result(settings, report)
