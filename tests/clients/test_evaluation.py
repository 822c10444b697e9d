"""lm-eval over HTTP: the log-likelihoods that it reads are those of transformers on the same weights."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from served import ROOT, Server

pytest.importorskip("lm_eval", reason="needs clients of others: make test-clients")

FOLDER = ROOT / "src" / "headway" / "assets" / "embedded"
# Context, choices, which of them is right. No context ends with a space, and no token spans its end: lm-eval would
# move the space to the choice, and count a token that spans the end to either.
QUESTIONS = [
    ("def read(self, size=-1):\n    return", [" self._file.read(size)", " 7 apples", " None or else"], 0),
    ("import os\nimport", [" sys", " (((("], 0),
    ("class Stack:\n    def __init__(self):\n        self.items", [" = []", " zebra zebra"], 0),
    ("for i in range(10):\n    print(", ["i)", "elephant", "0))"], 0),
]
TASK = """
task: local_code
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, questions = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
found = []
for context, choices, _ in questions:
    for choice in choices:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + choice)
        with torch.inference_mode():
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(scores[n - 1, whole[n]].item() for n in range(len(before), len(whole))))
print(json.dumps(found))
"""


def documented(server: Server) -> list[str]:
    """What docs/api.md says to type, without the program's name, for this server, task and folder."""
    (typed,) = re.findall(r"^lm_eval ((?:.*\\\n)*.*)$", (ROOT / "docs" / "api.md").read_text("utf8"), re.MULTILINE)
    for said, meant in (("http://127.0.0.1:8000", server.url), ("TASK", "local_code"), ("FOLDER", str(FOLDER))):
        assert said in typed
        typed = typed.replace(said, meant)
    return shlex.split(typed.replace("\\\n", ""))


def test_the_same_likelihoods_as_transformers(server: Server, tmp_path: Path) -> None:
    lines = [json.dumps({"context": c, "choices": options, "label": right}) for c, options, right in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "local_code.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    command = [sys.executable, "-m", "lm_eval", *documented(server)]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_local_code_*.jsonl")
    by_question = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        by_question[sample["doc"]["context"]] = [float(answer[0][0]) for answer in sample["resps"]]
    found = [score for context, _, _ in QUESTIONS for score in by_question[context]]
    python = os.environ.get("HEADWAY_PYTHON", sys.executable)
    reference = subprocess.run(
        [python, "-c", REFERENCE, str(FOLDER), json.dumps(QUESTIONS)], capture_output=True, text=True, check=True
    )
    assert found == pytest.approx(json.loads(reference.stdout), abs=2e-3)
