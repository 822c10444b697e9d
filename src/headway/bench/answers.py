"""Both ways in give the same answer: `python -m headway.bench.answers`.

`headway generate` in one process; `headway serve` in another, asked by openai-python. The embedded model, greedy.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headway.bench import report

PROMPT = "def fibonacci(n):"
MAX_TOKENS = 64
PATIENCE_S = 60.0


def generated() -> str:
    """What the command prints."""
    command = ["generate", PROMPT, "--max-tokens", str(MAX_TOKENS), "--temperature", "0"]
    done = subprocess.run([sys.executable, "-m", "headway", *command], capture_output=True, text=True, check=True)
    return done.stdout


def served() -> tuple[str, float]:
    """What the server answers to openai-python, and how many seconds it took to be ready."""
    from openai import OpenAI

    with tempfile.TemporaryFile("w+") as log:
        begun = time.monotonic()
        command = [sys.executable, "-m", "headway", "serve", "--port", "0"]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            address = _address(log.fileno(), server)
            ready_s = time.monotonic() - begun
            client = OpenAI(base_url=f"{address}/v1", api_key="none")
            answer = client.completions.create(
                model=client.models.list().data[0].id, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0
            )
            return answer.choices[0].text, ready_s
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def _address(log: int, server: subprocess.Popen[str]) -> str:
    """Where the server says that it is ready."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        printed = os.pread(log, 1 << 16, 0).decode()
        if "Ready" in printed and (found := re.search(r"http://[\d.]+:\d+", printed[printed.index("Ready") :])):
            return found[0]
        time.sleep(0.02)
    raise SystemExit(f"The server did not become ready:\n{os.pread(log, 1 << 16, 0).decode()}")


def main() -> None:
    if not Path("src").is_dir():
        print("Run it in the repository: the result goes to docs/results.", file=sys.stderr)
    text, (answer, ready_s) = generated(), served()
    same = bool(answer.strip()) and text.rstrip("\n").removeprefix(PROMPT) == answer.rstrip("\n")
    report.write(
        "answers",
        f"Two ways to continue `{PROMPT}`",
        report.command("python -m headway.bench.answers", None),
        f"`headway generate` and openai-python against `headway serve` {'agree' if same else 'DIFFER'}. The server was "
        f"ready {ready_s:.1f} s after its start.\n\n```python\n{PROMPT}{answer}\n```"
        + ("" if same else f"\n\n```python\n{text}\n```"),
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
