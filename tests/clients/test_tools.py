"""schemathesis asks what /openapi.json lets it ask; aiperf measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import ROOT, Server

pytest.importorskip("schemathesis", reason="needs clients of others: make test-clients")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
BIN = Path(sys.executable).parent


def test_every_answer_is_as_the_document_says(server: Server, tmp_path: Path) -> None:
    command = [str(BIN / "schemathesis"), "run", f"{server.url}/openapi.json", "--checks", CHECKS]
    command += ["--max-examples", "25", "--seed", "1", "--request-timeout", "60", "--exclude-path", "/live"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_aiperf_measures_it(server: Server, tmp_path: Path) -> None:
    command = [str(BIN / "aiperf"), "profile", "--model", "embedded", "--url", server.url]
    command += ["--endpoint-type", "completions", "--streaming", "--request-count", "12", "--concurrency", "3"]
    command += ["--tokenizer", str(ROOT / "src" / "headway" / "assets" / "embedded")]
    command += ["--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "8", "--ui", "none"]
    command += ["--artifact-dir", str(tmp_path)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    told = json.loads(report.read_text())
    assert told["request_count"]["avg"] == 12
    assert told["time_to_first_token"]["avg"] > 0
