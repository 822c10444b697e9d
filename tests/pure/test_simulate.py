"""`headway simulate`: a load on devices that are prices only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headway.bench import simulated
from headway.bench.policies import CHUNKS, policies
from headway.cli import main
from headway.core.cost import CostFit
from headway.core.settings import SchedulerSettings

SHORT = ["--length-scale", "0.0625", "--max-tokens", "1", "--num-requests", "120"]


def run(words: list[str]) -> simulated.Simulator:
    return simulated.Simulator(simulated.parser().parse_args(words))


def test_every_scheduler_is_a_few_switches_away_from_ours() -> None:
    """The names of the page, each with what it is about; ours is the base itself."""
    base = SchedulerSettings(max_model_len=100)
    known = policies(base, CHUNKS)
    assert known["operator"] is base
    assert not known["none"].suspends
    assert known["none"].order == "slack"
    assert (known["fcfs"].order, known["fcfs"].pack, known["fcfs"].refuse_unattainable) == ("fcfs", False, False)
    assert {known[f"chunk {size}"].chunk_tokens for size in CHUNKS} == set(CHUNKS)


def test_the_same_seed_gives_the_same_run() -> None:
    """And another seed another one."""
    once, again, other = (run(["qwen", *SHORT, "--spread", "0.2", "--seed", seed]) for seed in ("3", "3", "4"))
    scores = [simulator.attain("operator", 2.0).score for simulator in (once, again, other)]
    assert scores[0] == scores[1] != scores[2]


def test_two_devices_serve_nearly_twice_as_much() -> None:
    """The load goes to whoever has less to do."""
    one, two = (run(["qwen", *SHORT, "--devices", number]).find("operator").rate for number in ("1", "2"))
    assert 1.7 * one < two < 2.6 * one


def test_ours_beats_first_come_first_served() -> None:
    """The reason for all this, in prices: several times the goodput when every class counts."""
    simulator = run(["qwen", *SHORT, "--policies", "operator", "fcfs"])
    assert simulator.find("operator").rate > 3 * simulator.find("fcfs").rate


def test_prices_from_a_file(tmp_path: Path) -> None:
    """The four by themselves, or those that an engine keeps; anything else is one sentence."""
    plain, kept, wrong = tmp_path / "plain.json", tmp_path / "kept.json", tmp_path / "wrong.json"
    plain.write_text('{"step_s": 0.01, "token_s": 0.001}')
    kept.write_text('{"format": 1, "prices": {"rates": {}, "fit": {"step_s": 0.02, "token_s": 0.001}, "error": 0.1}}')
    wrong.write_text('{"step_s": "much"}')
    assert simulated.fit_of(plain) == CostFit(0.01, 0.001, 0.0, 0.0)
    assert simulated.fit_of(kept).step_s == 0.02
    with pytest.raises(ValueError, match="holds no prices"):
        simulated.fit_of(wrong)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        simulated.fit_of(tmp_path / "none.json")
    plain.write_text('{"step_s": 0.01, "token_s": 0}')
    with pytest.raises(ValueError, match="must cost something"):
        simulated.fit_of(plain)


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table on stdout; a document, a picture and a page in the folder."""
    pytest.importorskip("matplotlib", reason="the picture needs headway[bench]")
    words = ["simulate", "qwen", *SHORT, "--rates", "1", "2", "--policies", "operator", "fcfs", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "simulated requests per minute" in capsys.readouterr().out
    document = json.loads((tmp_path / "result.json").read_text())
    assert [point["rate"] for point in document["policies"]["fcfs"]["points"]] == [1.0, 2.0]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_an_unknown_policy_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """It names those that there are."""
    assert main(["simulate", "qwen", *SHORT, "--policies", "magic"]) == 1
    assert "choose from operator, layer" in capsys.readouterr().err


def test_no_tensors_are_needed() -> None:
    """It runs where no torch is."""
    code = "import sys, headway.bench.simulated; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
