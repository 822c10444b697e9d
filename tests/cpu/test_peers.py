"""Headway beside other engines: the model they share, what runners say, and the page, without any of those engines."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from headway.bench.peers import install, limits, measure, model, page, process, verdicts
from headway.bench.peers.engines import ENGINES, Engine, Venv
from headway.bench.peers.install import OwnFailed, PeerFailed
from headway.bench.peers.limits import Limits
from headway.bench.peers.measure import Case, Measured, Plan
from headway.models import decoder, presets, weights
from headway.models.config import parse_config, read_config

SMALL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 8300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
LLAMA = SMALL | {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 16,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# a runner that draws no token and takes a known time
FAKE = """
from runners.protocol import Decoded, serve
class Fake:
    notes = "fake"
    def __init__(self, load): self.load = load
    def prefill(self, prompts):
        print("chatter on standard output")
        assert all(0 <= token < self.load.vocab_size for prompt in prompts for token in prompt)
        return sum(map(len, prompts)) / 1000
    def decode(self, prompts, steps):
        if steps == 13: raise ValueError("no thirteen\\nsteps")
        return Decoded([0.5] * steps, [prompts[0][0]])
serve(Fake)
"""
PLAN = Plan((Case("prefill 3", (3,), 2),), (Case("decode B2", batch=2, context=4, steps=3),))


@pytest.mark.parametrize("fields", [SMALL, LLAMA], ids=["qwen2", "llama3"])
@torch.inference_mode()
def test_everybody_reads_the_same_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    """transformers and our own loader compute the same logits from the folder; its weights are those of the seed."""
    model.write(tmp_path, fields)
    assert read_config(tmp_path) == parse_config(fields)
    ours = weights.load(tmp_path, torch.float32)
    drawn = weights.random_decoder(parse_config(fields), model.SEED, torch.bfloat16)
    assert torch.equal(ours.embedding_VE, drawn.embedding_VE.float())
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(0, fields["vocab_size"], (2, 70), generator=torch.Generator().manual_seed(3))
    expected = oracle(input_ids=tokens).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(ours.head(decoder.forward(ours, tokens)), expected, atol=1e-4, rtol=0)


def fake(tmp_path: Path, what: str = FAKE) -> process.Process:
    return process.Process([sys.executable, "-c", what], tmp_path / "log", 1)


LOAD = {"model": "m", "vocab_size": 9, "precision": "bf16", "threads": 1, "longest": 64, "batch": 4, "seed": 1}


def test_a_runner_answers_line_by_line(tmp_path: Path) -> None:
    """Chatter does not come between, prompts are as long as asked, and it tells its memory at the end."""
    with fake(tmp_path) as runner:
        assert runner.ask("load", **LOAD) == {"notes": "fake"}
        assert runner.ask("prefill", lengths=[2, 3]) == {"seconds": 0.005}
        decoded = runner.ask("decode", batch=2, context=4, steps=3)
        assert decoded["seconds"] == [0.5] * 3
        assert runner.ask("quit")["peak_bytes"] > 1e6
    assert "chatter" in (tmp_path / "log").read_text()


def test_the_same_seed_asks_the_same_of_everybody(tmp_path: Path) -> None:
    """Two engines read the same prompts; another round reads others."""
    drawn = []
    for seed in (1, 1, 2):
        with fake(tmp_path) as runner:
            runner.ask("load", **LOAD | {"seed": seed, "vocab_size": 10**9})
            drawn.append(runner.ask("decode", batch=1, context=4, steps=1)["tokens"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_runner_that_fails_says_why(tmp_path: Path) -> None:
    """An error's first line; the last words of one that died; the silence of one that hangs."""
    with fake(tmp_path) as runner:
        runner.ask("load", **LOAD)
        with pytest.raises(PeerFailed, match=r"^decode: ValueError: no thirteen$"):
            runner.ask("decode", batch=1, context=4, steps=13)
    dies = "import sys; print('an error of its own', file=sys.stderr); sys.exit(3)"
    with pytest.raises(PeerFailed, match="ended with code 3 at load: an error of its own"), fake(tmp_path, dies) as one:
        one.ask("load", **LOAD)
    hangs = "import time; time.sleep(60)"
    with pytest.raises(PeerFailed, match=r"did not answer load within 0.2 s"), fake(tmp_path, hangs) as one:
        one.ask("load", patience_s=0.2, **LOAD)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Two rounds of ours, of a peer that runs and of one that does not, all of them the fake."""
    ours = Engine("Headway", "headway", "ours", "bf16", "safetensors", None)
    good = Engine("llama.cpp", "llama.cpp", "llama_cpp", "bf16", "safetensors", Venv("transformers"))
    bad = Engine("vLLM", "vllm", "vllm", "bf16", "safetensors", Venv("vllm"))

    def command_of(root: Path, engine: Engine) -> list[str]:
        if engine is bad:
            raise PeerFailed("pip install of vllm failed: no network.")
        return [sys.executable, "-c", FAKE]

    monkeypatch.setattr(measure, "command_of", command_of)
    monkeypatch.setattr(measure.convert, "converted", lambda root, name, form: tmp_path)
    told: list[str] = []
    found = measure.measure(
        tmp_path, "qwen2.5-0.5b", [ours, good, bad], PLAN, 2, 1, lambda threads: Limits(4e11, 8e11, 4e10), told.append
    )
    assert [line for line in told if "Headway" in line or "llama" in line] == [
        "Headway: set-up, first start",
        "llama.cpp: set-up, first start",
        "round 1 of 2: Headway",
        "round 1 of 2: llama.cpp",
        "round 2 of 2: llama.cpp",
        "round 2 of 2: Headway",
    ], "every second round goes backwards"
    return found


def test_rounds_become_rates(measured: Measured) -> None:
    """3 tokens in 3 ms are 1000 a second; 2 tokens in half a second are 4: in both rounds."""
    ours = measured.found[0]
    assert ours.rates == {"prefill 3": [1000.0, 1000.0], "decode B2": [4.0, 4.0]}
    assert ours.beside == {}
    assert len(ours.cold_s) == 2
    assert ours.install_bytes > 1e8, "torch alone is larger"


def test_a_peer_that_fails_is_named_with_its_reason(measured: Measured) -> None:
    """It has no column; the page says why, and the others are measured."""
    said = page.section(measured, PLAN)
    assert "vLLM did not run: pip install of vllm failed: no network." in said
    assert "| tokens/s | Headway | llama.cpp |" in said
    assert "| prefill 3 | 1000 (1000 … 1000) | 1000 (1000 … 1000) |" in said
    assert "1.00 × llama.cpp" in said


def test_our_own_failure_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without ourselves would compare nothing."""
    monkeypatch.setattr(measure.convert, "converted", lambda root, name, form: tmp_path)
    monkeypatch.setattr(measure, "command_of", lambda root, engine: [sys.executable, "-c", "raise SystemExit(1)"])
    with pytest.raises(PeerFailed):
        measure.measure(
            tmp_path, "qwen2.5-0.5b", [ENGINES[0]], PLAN, 1, 1, lambda threads: Limits(1, 1, 1), lambda what: None
        )


def test_ours_takes_turns_with_a_peer_case_by_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Both are loaded, and asked the same, the one that begins another each time; what ours does then is kept with the
    peer. A page's ratio is of the two, however fast ours was by itself."""
    peer = measured.found[1]
    assert peer.beside == {"prefill 3": [1000.0, 1000.0], "decode B2": [4.0, 4.0]}
    peer.beside = {"prefill 3": [1500.0, 1250.0], "decode B2": [6.0, 6.0]}
    assert "| prefill 3 | 1.38 × llama.cpp |" in page.section(measured, PLAN)
    assert page.own_rate(measured, "bf16", "prefill 3") == 1125.0
    asked: list[str] = []

    class Noted(process.Process):
        def ask(self, what: str, patience_s: float = 1.0, **fields: Any) -> dict[str, Any]:
            if what in ("prefill", "decode"):
                asked.append(self._log.stem)
            return super().ask(what, patience_s=60.0, **fields)

    monkeypatch.setattr(measure, "Process", Noted)
    measure.one_round(tmp_path, "qwen2.5-0.5b", peer, measured.found[0].engine, 1, PLAN, 0)
    one, other = "qwen2.5-0.5b-llama.cpp", "qwen2.5-0.5b-Headway"
    assert asked == [one, other] * 3 + [other, one]


def test_our_own_failure_is_not_told_as_a_peer_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Ours dies beside a peer that runs: there is no page, and the peer is not dropped from one."""

    def command_of(root: Path, engine: Engine) -> list[str]:
        return [sys.executable, "-c", FAKE if engine.venv else "raise SystemExit(1)"]

    monkeypatch.setattr(measure, "command_of", command_of)
    ours, peer = measured.found[:2]
    once = partial(measure.one_round, tmp_path, "qwen2.5-0.5b", peer, ours.engine, 1, PLAN, 0)
    with pytest.raises(OwnFailed, match="ended with code 1 at load"):
        measure._attempt(peer, once)
    assert not peer.failure


def test_peers_wait_as_they_would_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package sets how its own threads wait: a peer does not inherit that, ours does."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    tells = "import os, json; input(); print(json.dumps({'policy': os.environ.get('OMP_WAIT_POLICY')}), flush=True)"
    for is_ours, policy in ((True, "PASSIVE"), (False, None)):
        with process.Process([sys.executable, "-c", tells], tmp_path / "log", 1, is_ours=is_ours) as runner:
            assert runner.ask("tell") == {"policy": policy}


def said(
    case: str, ratios: dict[tuple[str, str], float], of_reading: float | None = None, ours: str = "Headway"
) -> str:
    wanted = next(each for each in verdicts.WANTED if (each.case, each.ours) == (case, ours))
    return verdicts.verdict(wanted, [ratios], of_reading)


def test_what_is_wanted_is_judged_against_the_best_peer() -> None:
    """The one that ours is least ahead of counts, by the factor that was asked for."""
    ratios = {("OpenVINO", "decode B8"): 1.15, ("vLLM", "decode B8"): 1.16, ("llama.cpp", "decode B8"): 0.2}
    alone = ", in a single round;"
    assert said("decode B8", ratios).startswith(f"decode B8: reached, 1.15 × OpenVINO{alone}")
    assert said("decode B8", ratios | {("vLLM", "decode B8"): 1.14}).startswith(f"decode B8: short, 1.14 × vLLM{alone}")
    del ratios["vLLM", "decode B8"]
    assert said("decode B8", ratios).endswith("(without vLLM).")
    del ratios["OpenVINO", "decode B8"]
    assert said("decode B8", ratios).startswith("decode B8: cannot be said")
    assert said("prefill mixed", ratios) == "prefill mixed: not measured."


def test_a_lone_decode_may_be_at_memory_instead() -> None:
    """1.1 times llama.cpp, or 92 % of what memory gives; int8 has its own peer and no such way out."""
    ratios = {("llama.cpp", "decode B1"): 1.03}
    alone = ", in a single round"
    short = f"decode B1: short, 1.03 × llama.cpp{alone}, 90% of the read bandwidth;"
    assert said("decode B1", ratios, 0.9).startswith(short)
    assert said("decode B1", ratios, 0.92).startswith("decode B1: reached")
    assert said("decode B1", {("llama.cpp", "decode B1"): 1.1}, 0.5).startswith("decode B1: reached")
    short = f"decode B1, int8: short, 0.98 × OpenVINO int8{alone};"
    assert said("decode B1", {("OpenVINO int8", "decode B1"): 0.98}, 0.99, "Headway int8").startswith(short)


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ((1.20, 1.16, 1.21), "reached, 1.20 × OpenVINO (1.16 … 1.21)"),
        ((1.20, 1.14, 1.21), "undecided, 1.20 × OpenVINO (1.14 … 1.21)"),
        ((1.00, 1.14, 1.13), "short, 1.13 × OpenVINO (1.00 … 1.14)"),
    ],
)
def test_rounds_that_disagree_decide_nothing(ours: tuple[float, ...], says: str) -> None:
    """What was wanted between the least and the most of them is neither reached nor missed."""
    wanted = next(each for each in verdicts.WANTED if each.case == "decode B8")
    beside = (1.0, 2.0, 2.0)  # a peer that comes out ahead in one round only is not the best of them
    rounds = [
        {("OpenVINO", "decode B8"): one, ("vLLM", "decode B8"): another}
        for one, another in zip(ours, beside, strict=True)
    ]
    assert verdicts.verdict(wanted, rounds).startswith(f"decode B8: {says};")


def test_limits_are_arithmetic_or_reading() -> None:
    """By hand: a lone token reads 0.99 GB of weights at 40 GB/s; many rows are bound by products; int8 reads half."""
    config, machine = presets.preset("qwen2.5-0.5b"), Limits(4e11, 8e11, 4e10)
    lone = limits.decode_s(config, 1, 512, "bf16", machine)
    assert lone == pytest.approx(0.988e9 / 4e10, rel=0.02)
    assert limits.decode_s(config, 1, 512, "int8", machine) == pytest.approx(lone / 2, rel=0.02)
    assert limits.decode_s(config, 64, 512, "bf16", machine) == pytest.approx(64 * 2 * 0.494e9 / 4e11, rel=0.1)
    assert limits.prefill_s(config, [512], "bf16", machine) == pytest.approx(512 * 2 * 0.358e9 / 4e11, rel=0.1)
    both = limits.together([Limits(1, 5, 3), Limits(2, 4, 7), Limits(1, 1, 4)])
    assert both == Limits(2, 5, 7)


def test_an_environment_that_cannot_be_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler; and a program that fails, by its own last word about an error."""
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(PeerFailed, match="there is no C\\+\\+ compiler"):
        install.installed(tmp_path, Venv("llama.cpp", needs_compiler=True))
    script = "import sys; print('ERROR: no such version\\nbye', file=sys.stderr); sys.exit(1)"
    with pytest.raises(PeerFailed, match=r"^this failed: ERROR: no such version$"):
        install.run([sys.executable, "-c", script], "this")


def test_every_environment_is_pinned() -> None:
    """One version each, or the page would not say what was measured."""
    for engine in ENGINES:
        if engine.venv is not None:
            lines = engine.venv.requirements.read_text().split()
            assert lines
            assert all("==" in line for line in lines)
