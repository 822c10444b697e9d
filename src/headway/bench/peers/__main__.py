"""Headway against the engines that a user could pick instead, on this CPU: `python -m headway.bench.peers`.

Every engine is installed in an environment of its own from pinned requirements (pip's own settings, such as
PIP_EXTRA_INDEX_URL, choose another build of torch), reads the same randomly initialised weights in its own format, and
runs in a process of its own: in each round all of them in turn start, read prompts, decode and end. Ours is started
beside each of them and asked the same, case by case in turn, while the other one is idle: the machine is another a few
minutes later. A peer that cannot be installed or run is named with the reason.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from headway.bench import report
from headway.bench.peers import limits, page
from headway.bench.peers.engines import ENGINES, GROUPS, OURS
from headway.bench.peers.install import PeerFailed
from headway.bench.peers.measure import FULL, MIXED, QUICK, UNCOUNTED_STEPS, measure
from headway.models import presets
from headway.models.config import ModelError
from headway.placement.memory import num_cores

COMMAND = "python -m headway.bench.peers"
MODELS = ("qwen2.5-0.5b",)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=MODELS,
        help="presets' shapes; others than the default, such as llama-3.2-1b, have a page of their own",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="PEER", help=", ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=3, help="twenty minutes each, with all engines on two cores")
    parser.add_argument("--num-threads", type=int, default=num_cores())
    parser.add_argument("--quick", action="store_true", help="one round of small cases, to see that all engines run")
    parser.add_argument("--root", type=Path, default=Path("runs/peers"), help="environments, models and logs")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    try:
        for model in options.models:
            presets.preset(model)
    except ModelError as error:
        parser.error(str(error))
    plan, rounds = (QUICK, 1) if options.quick else (FULL, options.rounds)
    engines = [engine for engine in ENGINES if engine.group in (OURS, *options.only)]
    sections, told, begun = [], "", time.monotonic()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        for model in options.models:
            task = progress.add_task(model)
            try:
                measured = measure(
                    options.root.absolute(), model, engines, plan, rounds, options.num_threads, limits.measured,
                    partial(_tell, progress, task, model),
                )  # fmt: skip
            except PeerFailed as failed:  # a peer's failure is told on the page; this one is our own
                sys.exit(f"Headway did not run, so there is nothing to compare with. {failed}")
            sections.append(page.section(measured, plan))
            told = page.notes(measured)
    minutes = (time.monotonic() - begun) / 60
    lengths = ", ".join(map(str, MIXED))
    report.write(
        "-".join(["cpu-peers", *(model for model in options.models if model not in MODELS)]),
        "Beside other engines, on a CPU",
        report.command(COMMAND, arguments),
        f"The same seeded random weights in every engine, {options.num_threads} threads, one engine at work at a time, "
        f"each in a process of its own that starts anew in each of {rounds} rounds; the order turns round by round. "
        f"Headway has rounds by itself, and beside each of the others it starts once more and does the same, case by "
        f"case in turn with it: a ratio is one of these two. Medians over the rounds (least … most). Prompts are "
        f"random ids, no two alike, nothing is cached between them; tokens are the likeliest ones. Prefill: from "
        f"asking to every prompt's first token; mixed: prompts of {lengths} tokens at once. Decode: the median step of "
        f"{plan.decodes[0].steps} behind {plan.decodes[0].context} tokens, after {UNCOUNTED_STEPS} that do not count. "
        f"Start: from the process's to a first token, files in the page cache. Peak memory is the whole round's. "
        f"Installed: the environment's files, for Headway those of its "
        f"distributions.\n\nVersions: {page.versions(engines)}. Took {minutes:.0f} minutes.\n\n{told}\n\n"
        + "\n\n".join(sections),
        options.folder,
    )


def _tell(progress: Progress, task: TaskID, model: str, what: str) -> None:
    progress.update(task, description=f"{model}: {what}")


if __name__ == "__main__":
    main()
