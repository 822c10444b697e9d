"""A whole engine in this process on a virtual clock, with mail that arrives after a given number of tiles."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch

from headway.bench.exactness import RecordingSampler
from headway.core import event as ev
from headway.core.clock import VirtualClock
from headway.core.cost import CostFit, CostModel
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.scheduler import Scheduler
from headway.core.settings import SchedulerSettings
from headway.core.work import TokenLogprobs
from headway.kv.pool import KVPool, PoolShape
from headway.models import weights
from headway.placement.driver import Driver
from headway.stages.language import LanguageStage
from headway.stages.sample import MakeMatcher, no_matcher
from headway.stages.tiling import Rates, Tiling

SLOW = Rates(1e8, 1e9, 1e7, 1e8, 1e6, 1e6, 1e8)  # so slow that a tiny model's operators are cut into many tiles


class AfterTiles:
    """A mailbox that is asked after every tile, and counts."""

    def __init__(self, letters: Iterable[tuple[int, ev.Event]]) -> None:
        self._letters = deque(sorted(letters, key=lambda letter: letter[0]))
        self._num_asked = 0

    def has_mail(self) -> bool:
        self._num_asked += 1
        return bool(self._letters) and self._letters[0][0] <= self._num_asked

    def take(self) -> list[ev.Event]:
        taken = []
        while self._letters and self._letters[0][0] <= self._num_asked:
            taken.append(self._letters.popleft()[1])
        return taken

    def wait(self, until: float | None) -> None:
        assert self._letters, "waiting for mail that never comes"
        self._num_asked = self._letters[0][0]


class Assembled:
    """Prices are fixed (a second per token), so that every decision is known beforehand."""

    def __init__(
        self,
        folder: Path,
        *,
        num_pages: int = 128,
        page_tokens: int = 8,
        pack_tokens: int = 64,
        rates: Rates = SLOW,
        dtype: torch.dtype = torch.float32,
        prefix_caching: bool = True,
        chunk_tokens: int | None = None,
        make_matcher: MakeMatcher = no_matcher,
    ) -> None:
        model = weights.load(folder, dtype)
        c = model.config
        self.pool = KVPool(PoolShape(num_pages, c.num_layers, page_tokens, c.num_kv_heads, c.head_size, dtype))
        self.sampler = RecordingSampler(c.vocab_size, make_matcher)
        self.stage = LanguageStage(model, self.pool, Tiling(rates, 0.010), self.sampler)
        settings = SchedulerSettings(
            max_model_len=c.max_positions,
            pack_tokens=pack_tokens,
            tile_s=0.01,
            prefix_caching=prefix_caching,
            preempt="operator" if chunk_tokens is None else "chunk",
            chunk_tokens=chunk_tokens or 512,
            refuse_unattainable=False,
        )
        cost = CostModel(CostFit(step_s=1.0, token_s=1.0))
        self.scheduler = Scheduler(settings, cost, PageTable(num_pages, page_tokens))
        self.answers: dict[str, list[int]] = {}
        self.scores: dict[str, list[TokenLogprobs]] = {}  # of prompts
        self.vectors: dict[str, tuple[float, ...]] = {}
        self.records: dict[str, Record] = {}
        self.driver: Driver

    def run(self, letters: Iterable[tuple[int, ev.Event]]) -> None:
        """Deliver every letter, and go on until every request has ended."""
        self.driver = Driver(
            self.scheduler, {"language": self.stage}, VirtualClock(), mailbox := AfterTiles(letters), self._tell, 0.0
        )
        with torch.inference_mode():
            while self.driver.turn() or mailbox._letters:
                if self.driver.num_open_steps == 0 and self.scheduler.num_open == 0 and mailbox._letters:
                    self.driver.wait()
        assert self.scheduler.num_open == 0
        self.scheduler.check_integrity()

    def _tell(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            self.answers.setdefault(effect.commit.request_id, []).extend(effect.commit.tokens)
            self.scores.setdefault(effect.commit.request_id, []).extend(effect.commit.prompt_logprobs)
            if effect.commit.vector:
                assert effect.commit.request_id not in self.vectors, "told twice"
                self.vectors[effect.commit.request_id] = effect.commit.vector
        elif isinstance(effect, ev.End):
            assert effect.record.request_id not in self.records, "ended twice"
            self.records[effect.record.request_id] = effect.record
