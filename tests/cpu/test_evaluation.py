"""The whole way over HTTP and an engine process: log-likelihoods and middles are transformers' on the same weights."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from headway import assets
from headway.config import DoorSettings, EngineSettings
from headway.models.tokenizer import open_model_text
from headway.placement.supervise import Supervisor
from headway.server.app import Door
from headway.train.infill import Cut, in_fim_order

FOLDER = Path(assets.__file__).parent / "embedded"
SETTINGS = EngineSettings(num_threads=1, dtype="float32", max_tile_ms=2.0, max_model_len=1024)
TEXT = open_model_text(None)
QUESTIONS = [  # context, continuation
    ("def read(self, size=-1):\n", "    return self._file.read(size)\n"),
    ("import os\nimport ", "sys"),
    ("class Stack:\n    def __init__(self):\n        self.items", " = []\n"),
    ("", "def main():\n    pass\n" * 20),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@asynccontextmanager
async def served() -> AsyncIterator[httpx.AsyncClient]:
    link = Supervisor(SETTINGS)
    await link.start()
    try:
        transport = httpx.ASGITransport(Door(TEXT, link, DoorSettings()).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://desk", timeout=60) as client:
            yield client
    finally:
        await link.close()


def ids_of(context: str, continuation: str) -> tuple[list[int], int]:
    """As lm-eval puts them together: without a context, the end of text stands for it. And how many are context."""
    before = list(TEXT.tokenizer.encode(context)) or [TEXT.tokenizer.eos_ids[0]]
    return before + list(TEXT.tokenizer.encode(continuation)), len(before)


def read(choice: Any, num_context: int) -> tuple[float, bool]:
    """As lm-eval reads an answer: the sum behind the context, the drawn token left out, and whether it was greedy."""
    scores = choice["logprobs"]["token_logprobs"][num_context:-1]
    best = choice["logprobs"]["top_logprobs"][num_context:-1]
    return sum(scores), all(score == max(top.values()) for score, top in zip(scores, best, strict=True))


@torch.inference_mode()
def expected(model: Any, ids: list[int], num_context: int) -> tuple[float, bool]:
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)[num_context - 1 : -1]
    targets = torch.tensor(ids[num_context:])
    greedy = bool((logprobs.argmax(-1) == targets).all())
    return float(logprobs.gather(1, targets[:, None]).sum()), greedy


def test_loglikelihoods(model: Any) -> None:
    """All questions in one call, as ids, beside a stream of other work; then one by one, and as text."""
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}

    async def story() -> None:
        async with served() as client:

            async def choices(prompt: Any, **more: Any) -> Any:
                response = await client.post("/v1/completions", json=asked | {"prompt": prompt} | more)
                assert response.status_code == 200, response.text
                return response.json()["choices"]

            prompts = [ids_of(*question) for question in QUESTIONS]
            beside = asyncio.create_task(choices("x = ", max_tokens=60, echo=False, ignore_eos=True))
            together = await choices([ids for ids, _ in prompts])
            await beside
            alone = [(await choices(ids))[0] for ids, _ in prompts]
            for found in (together, alone):
                for choice, (ids, num_context) in zip(found, prompts, strict=True):
                    loglikelihood, greedy = read(choice, num_context)
                    true, truly_greedy = expected(model, ids, num_context)
                    assert loglikelihood == pytest.approx(true, abs=2e-4)
                    assert greedy == truly_greedy
            text = "".join(QUESTIONS[0])
            (choice,) = await choices(text, max_tokens=0)
            true, _ = expected(model, list(TEXT.tokenizer.encode(text)), 1)
            assert choice["text"] == text
            assert sum(choice["logprobs"]["token_logprobs"][1:]) == pytest.approx(true, abs=2e-4)

    asyncio.run(story())


def test_a_middle_is_what_transformers_writes_after_the_same_ids(model: Any) -> None:
    """Greedy, 24 tokens, with the prompt as the recipe of the model arranged its lessons."""
    prefix, suffix = "def area(width, height):\n    return ", "\n\n\nprint(area(2, 3))\n"
    (arranged,) = in_fim_order([Cut(prefix, "", suffix)], TEXT.tokenizer._backend)
    ids = arranged[:-1]  # without the end
    with torch.inference_mode():
        written = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    expected = TEXT.tokenizer.decode(written[0, len(ids) :].tolist())

    async def story() -> None:
        async with served() as client:
            body = {"prompt": prefix, "suffix": suffix, "max_tokens": 24, "temperature": 0}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == expected
            assert answer["usage"]["prompt_tokens"] == len(ids)

    asyncio.run(story())
