"""schemathesis asks what /openapi.json lets it ask."""

import subprocess
import sys
from pathlib import Path

import pytest
from served import Server

pytest.importorskip("schemathesis", reason="needs clients of others: make test-clients")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
BIN = Path(sys.executable).parent


def test_every_answer_is_as_the_document_says(server: Server, tmp_path: Path) -> None:
    command = [str(BIN / "schemathesis"), "run", f"{server.url}/openapi.json", "--checks", CHECKS]
    command += ["--max-examples", "25", "--seed", "1", "--request-timeout", "60", "--exclude-path", "/live"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
