"""The command: flags, the file, and one sentence for whatever is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headway import __version__, cli
from headway.config import (
    ConfigError,
    DoorSettings,
    EngineSettings,
    SloClass,
    all_settings,
    flag,
    read_config_file,
    take,
)
from headway.server.run import listen


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineSettings, DoorSettings]]:
    """What `headway serve` would have served."""
    found: list[tuple[EngineSettings, DoorSettings]] = []

    def serve(engine: EngineSettings, door: DoorSettings) -> int:
        found.append((engine, door))
        return 0

    monkeypatch.setattr(cli, "_serve", serve)
    monkeypatch.delenv("HEADWAY_API_KEY", raising=False)
    return found


def test_without_arguments_everything_is_as_in_the_settings(served: list[Any]) -> None:
    assert cli.main(["serve"]) == 0
    assert served == [(EngineSettings(), DoorSettings())]


def test_a_flag_per_setting(served: list[Any]) -> None:
    words = "serve random:smollm2-135m --port 9 --max-model-len 512 --dtype float32 --no-enable-prefix-caching"
    words += " --api-key one two --served-model-name m --shutdown-timeout 5 --max-tile-ms 3.5 --log-level debug"
    assert cli.main(words.split()) == 0
    engine = EngineSettings(
        model="random:smollm2-135m",
        max_model_len=512,
        dtype="float32",
        enable_prefix_caching=False,
        max_tile_ms=3.5,
    )
    door = DoorSettings(
        port=9, api_key=("one", "two"), served_model_name=("m",), shutdown_timeout=5.0, log_level="debug"
    )
    assert served == [(engine, door)]


def test_a_file_has_the_same_names_and_flags_go_first(served: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "headway.yaml"
    path.write_text("model: random:smollm2-135m\nport: 9\nmax_num_seqs: 3\nmax-tile-ms: 5\napi-key: [a, b]\n")
    assert cli.main(["serve", "--config", str(path), "--port", "10"]) == 0
    engine, door = served[0]
    assert (engine.model, engine.max_num_seqs, engine.max_tile_ms) == ("random:smollm2-135m", 3, 5.0)
    assert (door.port, door.api_key) == (10, ("a", "b"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot: 9", "'prot', which is no setting: did you mean 'port'?"),
        ("max_model_length: 9", "'max_model_length', which is no setting: did you mean 'max-model-len'?"),
        ("colour: red", "'colour', which is no setting: see --help"),
        ("port: high", "port in .* is 'high': give a whole number"),
        ("port: true", "give a whole number"),
        ("dtype: int4", "choose from auto, float32, bfloat16"),
        ("- port", "must hold lines such as"),
        ("a: [", "is not YAML"),
        ("enable-prefix-caching: 1", "give a true or false"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "headway.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_config_file(str(path), EngineSettings, DoorSettings)


def test_the_key_may_come_from_the_environment(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other users of the machine do not see it."""
    monkeypatch.setenv("HEADWAY_API_KEY", "secret")
    cli.main(["serve"])
    cli.main(["serve", "--api-key", "other"])
    assert [door.api_key for _, door in served] == [("secret",), ("other",)]
    assert "secret" not in repr(served[0][1])


def test_a_key_that_came_out_empty_does_not_open_the_door(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a deployment's secret is not set."""
    monkeypatch.setenv("HEADWAY_API_KEY", "")
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve"])
    assert ended.value.code == 2
    assert "HEADWAY_API_KEY is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve", "--port", "99999"], "--port 99999 is out of range"),
        (["serve", "--port", "x"], "--port: invalid int value"),
        (["serve", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["serve", "--device", "tpu"], "--device tpu is not served"),
        (["serve", "--api-key", ""], "--api-key must be printable ASCII and not empty"),
        (["serve", "--api-key", "schlüssel"], "--api-key must be printable ASCII"),
        (["serve", "--shutdown-timeout", "nan"], "--shutdown-timeout nan is too small"),
        (["serve", "--nothing"], "unrecognized arguments: --nothing"),
        (["serve", "--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        (["generate", "a", "b", "c"], "give one MODEL and one PROMPT"),
        (["generate"], "required"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_sentence_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"headway: Cannot listen on 127.0.0.1:{port}")
    assert error.count("\n") == 1


def test_an_unknown_model_is_one_sentence_and_code_1() -> None:
    """The whole command, engine process and all."""
    command = [sys.executable, "-m", "headway", "serve", "nowhere", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("headway: There is no model 'nowhere'")
    assert ended.stderr.count("\n") == 1


def test_generate_hands_on_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cli, "_generate", lambda *call: calls.append(call) or 0)
    monkeypatch.setattr("sys.stdin", iter(()))
    assert cli.main(["generate", "def f():", "--max-tokens", "5", "--temperature", "0"]) == 0
    assert cli.main(["generate", "--num-threads", "1", "random:smollm2-135m", "--top-p", "0.5", "x y"]) == 0
    assert calls == [
        ("def f():", {}, {"max_tokens": 5, "temperature": 0.0}),
        ("x y", {"model": "random:smollm2-135m", "num_threads": 1}, {"top_p": 0.5}),
    ]


def test_help_names_every_setting_with_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for name, (_, field) in all_settings(EngineSettings, DoorSettings).items():
        if name != "model":
            assert flag(name) in text
        assert len(field.metadata["help"]) > 3
    for group in ("model:", "memory:", "scheduling:", "server:"):
        assert group in text


def test_version_and_help_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"headway {__version__}\n"
    assert cli.main([]) == 2
    assert "serve" in capsys.readouterr().err


def test_neither_the_command_nor_the_door_imports_torch() -> None:
    """It would cost every start a second and the door its memory."""
    program = "import sys, headway.cli, headway.server.app, headway.server.http, headway.placement.supervise\n"
    program += "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[]\n"


# Classes


CLASSES = (SloClass("chat", ttft_ms=250, tpot_ms=99.5, priority=-1), SloClass("file", total_ms=6e4), SloClass("batch"))


@pytest.mark.parametrize(
    "content",
    [
        "slo-classes: {chat: {ttft-ms: 250, tpot-ms: 99.5, priority: -1}, file: {total_ms: 60000}, batch: {}}",
        "slo_classes:\n  chat: {ttft_ms: 250, tpot_ms: 99.5, priority: -1}\n  file: {total-ms: 6.0e+4}\n  batch:\n",
        "slo-classes: ['chat=ttft:250,tpot:99.5,priority:-1', 'file=total:60000', batch]",
    ],
)
def test_classes_are_the_same_in_a_file_and_as_a_flag(served: list[Any], tmp_path: Path, content: str) -> None:
    path = tmp_path / "headway.yaml"
    path.write_text(content)
    assert cli.main(["serve", "--config", str(path)]) == 0
    texts = ["chat=ttft:250,tpot:99.5,priority:-1", "file=total:60000", "batch"]
    assert cli.main(["serve", "--slo-classes", *texts]) == 0
    assert [door.slo_classes for _, door in served] == [CLASSES, CLASSES]
    assert [str(one) for one in CLASSES] == texts, "printed as the flag that would make it"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("slo-classes: [{chat: 250}]", "give a text"),
        ("slo-classes: {chat: 250}", "chat is 250: give targets such as"),
        ("slo-classes: {chat: {speed: 9}}", "has the key 'speed': choose from ttft-ms, tpot-ms, total-ms, priority"),
        ("slo-classes: {chat: {name: x}}", "has the key 'name'"),
        ("slo-classes: {chat: {ttft-ms: soon}}", "ttft-ms of chat of .* is 'soon': give a number"),
        ("slo-classes: {chat: {ttft-ms: true}}", "give a number"),
        ("slo-classes: {chat: {priority: 1.5}}", "give a whole number"),
        ("slo-classes: {'a b': {}}", "has the name 'a b': give 1 to 32 letters"),
    ],
)
def test_a_class_that_is_wrong_in_a_file_says_where(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "headway.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        take(DoorSettings, read_config_file(str(path), EngineSettings, DoorSettings))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["chat=ttft:-5"], "gives chat the ttft -5: give a positive number of milliseconds"),
        (["chat=ttft:nan"], "gives chat the ttft nan"),
        (["chat=tpot:inf"], "gives chat the tpot inf"),
        (["chat=total:0"], "gives chat the total 0"),
        (["chat=ttft:soon"], "has 'ttft:soon' in 'chat=ttft:soon': give a number"),
        (["chat=priority:1.5"], "give a whole number"),
        (["chat=priority:99999999999999999999"], "more than 64 bits"),
        (["chat=speed:9"], "give each of ttft, tpot, total, priority at most once"),
        (["chat=ttft:1,ttft:2"], "at most once"),
        (["=ttft:1"], "has the name ''"),
        (["x" * 33], "give 1 to 32 letters"),
        (["none"], "may not name none"),
        (["custom"], "may not name custom"),
        (["chat", "chat=ttft:1"], "has chat twice"),
        ([f"c{number}" for number in range(33)], "has 33 names: give at most 32"),
    ],
)
def test_a_class_that_is_wrong_on_the_command_is_one_sentence(
    texts: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--slo-classes", *texts])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
