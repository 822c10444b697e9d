"""The embedded model, from nothing: a small decoder of Python code, trained on the standard library's source.

`python recipes/embedded.py RUN_FOLDER` runs it whole (about half an hour of one core) and writes
`src/headway/assets/embedded` with its card and `docs/results/embedded-model.md`. Stopped at any moment, the same
command goes on from the last checkpoint.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from embedded_report import LOOPS, card, measure, result
from headway.models.config import DecoderConfig, parse_config
from headway.models.decoder import Decoder
from headway.train.data import Corpus, Phase, Stream, in_phases, split, standard_library
from headway.train.export import save_folder
from headway.train.infill import mixed_epoch
from headway.train.loop import Account, Plan, train
from headway.train.objective import next_token
from headway.train.optimize import Rates, muon_and_adamw
from headway.train.parameters import copy_into, initial_decoder, named_tensors
from headway.train.repetition import leave_loops
from headway.train.vocabulary import sentinels_of, train_vocabulary

REPOSITORY = Path(__file__).resolve().parents[1]
ASSET = REPOSITORY / "src/headway/assets/embedded"
RESULT = REPOSITORY / "docs/results/embedded-model.md"
BATCH_TOKENS = 4096


class Lesson(NamedTuple):
    """A part of the run with batches of its own; the rates fall over all parts together.

    Pieces are a bit under the sequence, at 3.6 characters a token. The first two lessons left a model that could not
    go on from a line end, where it wrote a sentinel: hence the later ones. The last has sequences of the full
    context, so that its length is no empty claim.
    """

    num_steps: int
    sequence_tokens: int
    piece_characters: int  # of files in FIM order
    stretch_characters: int | None  # of other files, see infill.stretches
    sentinels_predicted: bool  # or only read, since it is the prompt that sets them


@dataclass(frozen=True, slots=True)
class Settings:
    """The model's shape and its training. The defaults made the model in the repository."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    intermediate_size: int = 704
    held_out_share: float = 0.04
    fim_share: float = 0.5
    seed: int = 1
    lessons: tuple[Lesson, ...] = (
        Lesson(800, 512, piece_characters=1400, stretch_characters=None, sentinels_predicted=True),
        Lesson(200, 512, piece_characters=1400, stretch_characters=300, sentinels_predicted=True),
        Lesson(400, 512, piece_characters=1400, stretch_characters=100, sentinels_predicted=False),
        Lesson(200, 2048, piece_characters=5000, stretch_characters=100, sentinels_predicted=False),
    )
    warmup_steps: int = 40
    rates: Rates = field(default_factory=Rates)
    # a short second run: the first left a model whose greedy text was one word over and over
    loops: Lesson = field(default_factory=lambda: Lesson(80, 512, 1400, 100, sentinels_predicted=False))
    loops_rates: Rates = field(default_factory=lambda: Rates(matrices=0.006, rest=0.0024))
    temperature: float = 0.5  # the recommended one, chosen from the table in the card
    compiled: bool = True  # needs a C++ compiler; without one a step takes 1.5 times as long

    @property
    def plan(self) -> Plan:
        num_steps = sum(lesson.num_steps for lesson in self.lessons)
        return Plan(num_steps=num_steps, warmup_steps=self.warmup_steps, seed=self.seed)

    @property
    def model(self) -> DecoderConfig:
        return parse_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.hidden_size // 64,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "intermediate_size": self.intermediate_size,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
                "eos_token_id": 0,
            }
        )


def corpus_of(settings: Settings) -> Corpus:
    return split(standard_library(), settings.held_out_share)


def vocabulary_of(settings: Settings, corpus: Corpus, run: Path) -> Tokenizer:
    """The run's vocabulary: trained once, then read again, so that a resumed run counts in the same tokens."""
    path = run / "tokenizer.json"
    if not path.is_file():
        run.mkdir(parents=True, exist_ok=True)
        train_vocabulary((document.text for document in corpus.train), settings.vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


def train_decoder(
    settings: Settings, corpus: Corpus, tokenizer: Tokenizer, run: Path, stop_after: int | None = None
) -> tuple[Decoder, Account]:
    """Train to the end of the plan (or to `stop_after`), from `run`'s checkpoint if it has one."""
    model = initial_decoder(settings.model, settings.seed)
    parameters = named_tensors(model)

    optimizers = muon_and_adamw(parameters, settings.rates)
    batches = in_phases(
        [
            Phase(each.num_steps, stream_of(each, settings, corpus, tokenizer, settings.seed))
            for each in settings.lessons
        ]
    )
    at = sentinels_of(tokenizer)
    done = 0
    for lesson in settings.lessons:
        done += lesson.num_steps
        given = () if lesson.sentinels_predicted else (at.prefix, at.middle, at.suffix)
        objective = next_token(model, dtype=torch.bfloat16, compiled=settings.compiled, given=given)
        stop = done if stop_after is None else min(done, stop_after)
        account = train(settings.plan, parameters, optimizers, objective, batches, run, stop_after=stop)
    return model, account


def teach_to_leave_loops(
    settings: Settings, corpus: Corpus, tokenizer: Tokenizer, model: Decoder, run: Path
) -> Account:
    """The second run, with fresh optimizers and low rates; like the first, it resumes from its own checkpoint.

    The model becomes the mean of what both runs ended with: half-way, most loops are gone already, and little of the
    held-out loss is spent on it (docs/results).
    """
    parameters = named_tensors(model)
    first = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    at = sentinels_of(tokenizer)
    account = train(
        Plan(num_steps=settings.loops.num_steps, warmup_steps=min(8, settings.loops.num_steps), seed=settings.seed + 1),
        parameters,
        muon_and_adamw(parameters, settings.loops_rates),
        leave_loops(model, dtype=torch.bfloat16, given=(at.prefix, at.middle, at.suffix)),
        stream_of(settings.loops, settings, corpus, tokenizer, seed=settings.seed + 1),
        run,
    )
    copy_into(parameters, {name: (first[name] + second.detach()) / 2 for name, second in parameters.items()})
    return account


def stream_of(lesson: Lesson, settings: Settings, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> Stream:
    epoch = mixed_epoch(
        corpus.train,
        tokenizer,
        fim_share=settings.fim_share,
        piece_characters=lesson.piece_characters,
        stretch_characters=lesson.stretch_characters,
    )
    return Stream(
        epoch,
        sequence_tokens=lesson.sequence_tokens,
        sequences=BATCH_TOKENS // lesson.sequence_tokens,
        seed=seed * 10_000 + lesson.sequence_tokens + (lesson.stretch_characters or 0),
    )


def export(settings: Settings, model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    save_folder(
        folder,
        model,
        tokenizer,
        end_of_text="<|endoftext|>",
        pad="<|fim_pad|>",
        generation={"do_sample": True, "temperature": settings.temperature, "top_p": 0.95},
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("run", type=Path, help="folder for checkpoints and the log; resumed if it holds a run")
    arguments.add_argument("--stop-after", type=int, help="stop at this step and export nothing; a later call goes on")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    settings = Settings()
    corpus = corpus_of(settings)
    tokenizer = vocabulary_of(settings, corpus, options.run)
    model, account = train_decoder(settings, corpus, tokenizer, options.run, options.stop_after)
    if account.num_steps < settings.plan.num_steps:
        return
    more = teach_to_leave_loops(settings, corpus, tokenizer, model, options.run / LOOPS)
    account = account.plus(more)
    export(settings, model, tokenizer, ASSET)
    report = measure(corpus, account, ASSET, options.run)
    (ASSET / "README.md").write_text(card(settings, report), encoding="utf8")
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(result(settings, report), encoding="utf8")


if __name__ == "__main__":
    main()
