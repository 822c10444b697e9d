"""The command `headway`: few sub-commands, flags made from the settings they set. Imports no torch.

A wrong argument ends with code 2, anything else that keeps it from working with code 1 and one sentence on stderr.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from headway import __version__
from headway.config import (
    ConfigError,
    DoorSettings,
    EngineSettings,
    all_settings,
    flag,
    read_config_file,
    take,
    value_type,
)

EXAMPLE = "def fibonacci(n):"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in COMMANDS:
            return COMMANDS[words[0]](words[1:])
        return _overview(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def serve(words: Sequence[str]) -> int:
    """`headway serve`"""
    parser = _parser("serve", "Serve a model over HTTP, with OpenAI's API.", EngineSettings, DoorSettings)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=_model_help())
    options = _options(parser, vars(parser.parse_args(words)), EngineSettings, DoorSettings)
    try:
        if "api_key" not in options and "HEADWAY_API_KEY" in os.environ:
            options["api_key"] = (_key(os.environ["HEADWAY_API_KEY"]),)
        engine, door = take(EngineSettings, options), take(DoorSettings, options)
    except ConfigError as error:
        parser.error(str(error))
    return _or_one_sentence(lambda: _serve(engine, door))


def _key(given: str) -> str:
    """An empty one, such as an unset secret leaves behind, must not open the door to everybody."""
    if not given:
        raise ConfigError("HEADWAY_API_KEY is empty: set it to a key, or unset it to serve without one.")
    return given


def _serve(engine: EngineSettings, door: DoorSettings) -> int:
    from headway.placement.supervise import EngineStartError, Supervisor
    from headway.server import logs, run
    from headway.server.tls import tls_options

    logs.set_up(door.log_level, door.log_format)
    tls = tls_options(door)
    listener = run.listen(door.host, door.port)
    where = run.address(listener, "https" if tls else "http")
    print(f"Headway {__version__}: loading {engine.model or 'the embedded model'} …", flush=True)

    def announce(facts: Any, model: str) -> None:
        print(_what_was_resolved(facts) + _what_to_try(where, model, needs_key=bool(door.api_key)), flush=True)

    with asyncio.Runner(loop_factory=_fast_loop) as runner:
        try:
            return runner.run(run.serve(engine.model, door, Supervisor(engine), listener, announce))
        except EngineStartError as error:
            raise ConfigError(str(error)) from error


def generate(words: Sequence[str]) -> int:
    """`headway generate`"""
    parser = _parser("generate", "Continue a prompt, on stdout, in this process.", EngineSettings)
    parser.add_argument("words", nargs="+", metavar="[MODEL] PROMPT", help="- reads the prompt from stdin")
    sampling = parser.add_argument_group("sampling")
    for name, kind, what in SAMPLING:
        sampling.add_argument(flag(name), type=kind, default=argparse.SUPPRESS, metavar=_metavar(kind), help=what)
    given = vars(parser.parse_intermixed_args(words))
    *model, prompt = given.pop("words")
    if len(model) > 1:
        parser.error("give one MODEL and one PROMPT; quote a prompt that has spaces.")
    drawn = {name: given.pop(name) for name, _, _ in SAMPLING if name in given}
    options = _options(parser, given | ({"model": model[0]} if model else {}), EngineSettings)
    try:
        take(EngineSettings, options)
    except ConfigError as error:
        parser.error(str(error))
    if prompt == "-":
        prompt = sys.stdin.read()
    return _or_one_sentence(lambda: _generate(prompt, options, drawn))


def _generate(prompt: str, options: dict[str, Any], drawn: dict[str, Any]) -> int:
    from headway.placement import collector

    collector.rest()
    from headway.llm import LLM, SamplingParams  # torch comes with it

    params, llm = SamplingParams(**({"max_tokens": 128} | drawn)), LLM(**options)
    collector.calm()
    for piece in llm.stream(prompt, params):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0


def simulate(words: Sequence[str]) -> int:
    """`headway simulate`"""
    from headway.bench import simulated

    return _or_one_sentence(lambda: simulated.main(words))


def bench(words: Sequence[str]) -> int:
    """`headway bench`"""
    from headway.bench import command

    return _or_one_sentence(lambda: command.main(words))


SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "length of the answer at most; default: 128"),
    ("temperature", float, "0 is greedy; default: what the model asks for"),
    ("top_p", float, "draw from the likeliest tokens that hold this share; default: what the model asks for"),
    ("top_k", int, "draw from so many likeliest tokens; default: what the model asks for"),
)
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "generate": generate,
    "bench": bench,
    "simulate": simulate,
}


def _overview(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="headway",
        description="An inference engine and server for models that must answer in time.",
        epilog="`headway COMMAND --help` shows a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"headway {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("serve", help="serve a model over HTTP, with OpenAI's API", add_help=False)
    commands.add_parser("generate", help="continue a prompt, on stdout", add_help=False)
    commands.add_parser("bench", help="measure a server by its deadlines", add_help=False)
    commands.add_parser("simulate", help="the same scheduler on devices that are prices only", add_help=False)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    parser.parse_args(words)  # leaves: with the help, the version, or what is wrong
    return 2


def _or_one_sentence(work: Callable[[], int]) -> int:
    """Whatever is wrong with the surroundings is told in one sentence."""
    try:
        return work()
    except ValueError as error:  # ConfigError, ModelError, and what a prompt can have against it
        print(f"headway: {error}", file=sys.stderr)
        return 1


# Flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the wall of flags that argparse would put before it."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(command: str, description: str, *kinds: type) -> _Parser:
    """One flag per setting, in groups; what is not given is left out of the result."""
    parser = _Parser(
        prog=f"headway {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=112),
    )
    parser.add_argument("--config", metavar="FILE", help="YAML whose keys are the flags below; flags given here win")
    groups: dict[str, Any] = {}
    for name, (kind, field) in all_settings(*kinds).items():
        if name == "model":
            continue
        title = field.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        group.add_argument(flag(name), **_argument(value_type(kind, name), field.default, field.metadata["help"]))
    return parser


def _argument(wanted: Any, default: Any, what: str) -> dict[str, Any]:
    """How argparse is told of a setting."""
    told: dict[str, Any] = {"default": argparse.SUPPRESS, "help": what}
    if default not in (None, ()):
        told["help"] += f" (default: {default})"
    if wanted is bool:
        return told | {"action": argparse.BooleanOptionalAction}
    if get_origin(wanted) is tuple:
        return told | {"nargs": "+", "metavar": "TEXT"}
    if get_origin(wanted) is Literal:
        return told | {"choices": get_args(wanted)}
    return told | {"type": wanted, "metavar": _metavar(wanted)}


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _model_help() -> str:
    return str(all_settings(EngineSettings)["model"][1].metadata["help"])


def _options(parser: _Parser, given: dict[str, Any], *kinds: type) -> dict[str, Any]:
    """The settings in the file, if one was named, with the flags over them."""
    path = given.pop("config", None)
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return (read_config_file(path, *kinds) if path else {}) | flags
    except ConfigError as error:
        parser.error(str(error))


# What is printed


def _what_was_resolved(facts: Any) -> str:
    lines = {
        "model": f"{facts.model_name}, {_count(facts.num_parameters)} parameters",
        "dtype": facts.dtype_reason if facts.dtype in facts.dtype_reason else f"{facts.dtype}, {facts.dtype_reason}",
        "device": f"{facts.device}, {facts.num_threads} threads",
        "operators": f"linear ones {facts.linear}, others {facts.operators}",
        "context": f"{facts.max_model_len} tokens, up to {facts.max_num_seqs} requests at once",
        "pages": f"{facts.num_pages} of {facts.page_tokens} tokens, {facts.pool_bytes / 2**20:.0f} MiB",
        "tile": f"{facts.max_tile_ms:g} ms at most",
        "prices": _prices(facts),
        "loaded in": f"{facts.load_s:.1f} s",
    }
    return "".join(f"  {name:<10} {line}\n" for name, line in lines.items())


def _prices(facts: Any) -> str:
    fit = facts.cost_fit
    return (
        f"{fit.step_s * 1e3:.3g} ms a step and {fit.token_s * 1e3:.3g} ms a token, {facts.cost_error:.0%} off on steps "
        f"held out; {facts.cost_source}"
    )


def _what_to_try(where: str, model: str, *, needs_key: bool) -> str:
    header = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    return f"""
Ready. In a browser:  {where}

With curl:
  curl {where}/v1/completions{header} -H 'Content-Type: application/json' \\
    -d '{{"prompt": "{EXAMPLE}", "max_tokens": 64}}'

In Python (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="{where}/v1", api_key="{"KEY" if needs_key else "none"}")
  answer = client.completions.create(model="{model}", prompt="{EXAMPLE}", max_tokens=64)
  print(answer.choices[0].text)

Ctrl-C lets open requests finish and leaves.
"""


def _count(number: int) -> str:
    for power, unit in ((9, "billion"), (6, "million"), (3, "thousand")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return str(number)


def _fast_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    sys.exit(main())
