"""An engine in a process of its own, spoken to in JSON lines. Knows no engine: see `runners/protocol.py`."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headway.bench.peers.engines import HERE
from headway.bench.peers.install import OwnFailed, PeerFailed, last_words

OURS_ALONE = ("PYTHONPATH", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # the package sets the last two itself
PATIENCE_S = 900.0  # for one answer: vLLM compiles for a minute before its first


class Process:
    """A runner. Leaving the `with` block ends it, whatever state it is in."""

    def __init__(self, command: list[str], log: Path, num_threads: int, *, is_ours: bool = False) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._failed = OwnFailed if is_ours else PeerFailed
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        for name in () if is_ours else OURS_ALONE:
            environment.pop(name, None)
        self.begun = time.monotonic()
        with log.open("w", encoding="utf8") as errors:
            self._process = subprocess.Popen(
                command, cwd=HERE, env=environment, text=True, stderr=errors,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # it is gone, with a question unread
                    continue
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, what: str, patience_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """Its answer. Raises PeerFailed, or OwnFailed, if there is none in time, or an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(patience_s, give_up)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": what, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            raise self._failed(f"It did not answer {what} within {patience_s:g} s.")
        if not line:
            code = self._process.wait()
            said = last_words(self._log.read_text(encoding="utf8", errors="replace"))
            raise self._failed(f"It ended with code {code} at {what}: {said}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(f"{what}: {answer['error']}")
        return answer
