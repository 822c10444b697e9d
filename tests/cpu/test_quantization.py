"""int8 through the engine: it says so, answers much as bfloat16 does, and is refused where it cannot be had."""

from pathlib import Path

import pytest
import torch

from headway.bench import quantization
from headway.config import ConfigError, EngineSettings
from headway.llm import LLM, SamplingParams
from headway.placement import engine
from headway.stages.panels import panels_for

needs_panels = pytest.mark.skipif(
    panels_for(torch.bfloat16, torch.device("cpu"), integers=True) is None, reason="nothing is compiled here"
)
PROMPTS = [
    "def add(a, b):\n    return",
    "import os\nimport ",
    "class Stack:\n    def __init__(self):\n        self.items",
]


@needs_panels
def test_it_answers_much_as_bfloat16_does() -> None:
    """Surprise by a text of its own kind differs by little, and not by nothing: rounded matrices are in use."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    surprises = []
    for name in ("none", "int8"):
        with LLM(dtype="bfloat16", quantization=name, max_model_len=512, num_threads=1) as llm:
            assert ("int8" in llm.facts.linear) == (name == "int8")
            answers = llm.generate(PROMPTS, params)
            scores = [each.logprob for answer in answers for each in answer.prompt_logprobs]
            surprises.append(-sum(scores) / len(scores))
    assert 0 < abs(surprises[1] - surprises[0]) < 0.1


@needs_panels
def test_the_command_writes_its_page(tmp_path: Path) -> None:
    quantization.main(
        ["--models", "--windows", "2", "--prompts", "2", "--tokens", "4", "--pairs", "1", "--folder", str(tmp_path)]
    )
    page = (tmp_path / "quantization.md").read_text()
    assert "2 windows of 1024 tokens" in page
    assert "Greedy answers of 4 tokens to 2 prompts" in page


def test_without_compiled_operators_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "panels_for", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="quantization int8 needs a CPU and the operators that are compiled"):
        engine.build_engine(EngineSettings(quantization="int8"))


def test_what_it_cannot_be_made_from_is_said() -> None:
    with pytest.raises(ConfigError, match="made from bfloat16"):
        EngineSettings(quantization="int8", dtype="float32")
    with pytest.raises(ConfigError, match="choose none or int8"):
        EngineSettings(quantization="fp8")
