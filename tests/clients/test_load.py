"""aiperf: a short load by somebody else's clock, with targets, and what it reads of /metrics meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import ROOT, Server

pytest.importorskip("aiperf", reason="needs clients of others: make test-clients")

FOLDER = ROOT / "src" / "headway" / "assets" / "embedded"
AIPERF = Path(sys.executable).parent / "aiperf"
NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_TOKENS = 16, 40, 8


def hub(home: Path, folder: Path) -> str:
    """The tokenizer's folder as if a hub had been asked for it once: offline, aiperf looks there and nowhere else."""
    model = home / "hub" / "models--local--tokenizer"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(folder)
    return "local/tokenizer"


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_all_requests_of_a_load_are_answered_and_timed(server: Server, tmp_path: Path, kind: str) -> None:
    command = [
        str(AIPERF),
        "profile",
        "--model",
        "embedded",
        "--url",
        server.url,
        "--endpoint-type",
        kind,
        "--streaming",
    ]
    command += ["--tokenizer", hub(tmp_path / "home", FOLDER), "--random-seed", "1", "--concurrency", "3"]
    command += ["--request-count", str(NUM_REQUESTS), "--synthetic-input-tokens-mean", str(NUM_PROMPT_TOKENS)]
    command += ["--output-tokens-mean", str(NUM_TOKENS), "--extra-inputs", "ignore_eos:true", "--extra-inputs"]
    command += ["temperature:0", "--goodput", "time_to_first_token:20000 inter_token_latency:20000"]
    command += [
        "--no-gpu-telemetry",
        "--ui",
        "none",
        "--use-server-token-count",
        "--artifact-dir",
        str(tmp_path / "out"),
    ]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert found["is_complete"]
    assert not found["error_summary"]
    assert found["request_error_rate"]["avg"] == 0
    assert found["request_count"]["avg"] == found["good_request_count"]["avg"] == NUM_REQUESTS
    assert 0 < found["time_to_first_token"]["min"] <= found["time_to_first_token"]["max"] < 20_000
    assert found["inter_token_latency"]["avg"] > 0
    assert found["output_sequence_length"]["avg"] == NUM_TOKENS
    if kind == "completions":
        assert found["input_sequence_length"]["avg"] == NUM_PROMPT_TOKENS
    read = json.loads((tmp_path / "out" / "server_metrics_export.json").read_text())["metrics"]
    assert read["vllm:time_to_first_token_seconds"]["series"][0]["stats"]["count"] >= NUM_REQUESTS
    assert read["vllm:iteration_tokens_total"]["series"][0]["stats"]["count"] > 0
