"""The cast of the scheduler's stories: a scheduler, a clock on the wall, and prices that can be done by hand.

A token costs 10 ms and nothing else costs anything, so 100 tokens are a second. A page holds four tokens. `Story.tell`
feeds one event, `Story.plan` asks what to run; both are followed by an audit of every page and record.
"""

from headway.core import event as ev
from headway.core.cost import CostFit, CostModel
from headway.core.ledger import Record
from headway.core.pages import PageTable
from headway.core.request import Request
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, SchedulerSettings
from headway.core.work import Commit, Outcome, Segment, Work

PAGE_TOKENS = 4
TOKEN_S = 0.01
TILE_S = 0.01


class Story:
    """One scheduler whose device is driven by hand."""

    def __init__(self, num_pages: int = 200, max_model_len: int = 400, **settings: int | float | bool | str) -> None:
        wishes: dict[str, object] = {"refuse_unattainable": False, **settings}
        chosen = SchedulerSettings(max_model_len=max_model_len, tile_s=TILE_S, **wishes)  # type: ignore[arg-type]
        self.now = 0.0
        self.scheduler = Scheduler(chosen, CostModel(CostFit(token_s=TOKEN_S)), PageTable(num_pages, PAGE_TOKENS))

    def tell(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.scheduler.handle(event, self.now)
        self.scheduler.check_integrity()
        return effects

    def arrives(self, request_id: str, prompt: int | tuple[int, ...], max_tokens: int = 9, **wishes: object) -> Request:
        """A prompt, or a number of tokens that nobody else has, is sent and let in."""
        request = self.request(request_id, prompt, max_tokens, **wishes)
        (admit,) = self.tell(ev.Arrived(request))
        assert isinstance(admit, ev.Admit)
        assert admit.request is request
        return request

    def request(self, request_id: str, prompt: int | tuple[int, ...], max_tokens: int = 9, **wishes: object) -> Request:
        tokens = prompt if isinstance(prompt, tuple) else prompt_of(request_id, prompt)
        return Request(request_id, tokens, max_tokens, self.now, **wishes)  # type: ignore[arg-type]

    def plan(self, progress: float = 0.0) -> Work | None:
        work = self.scheduler.plan(self.now, Lane(progress=progress))
        self.scheduler.check_integrity()
        return work

    def done(self, work: Work | None, busy_s: float | None = None, **tokens: int) -> list[ev.Effect]:
        """The step ran to its end, in the time it was priced at unless told otherwise, and drew these tokens."""
        assert work is not None
        commits = tuple(Commit(request_id, (token,)) for request_id, token in tokens.items())
        taken_s = work.num_tokens * TOKEN_S if busy_s is None else busy_s
        return self.tell(ev.StepDone(work.id, Outcome(commits), taken_s))

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def begins(self, request_id: str, prompt: int | tuple[int, ...], token: int = 7, **wishes: object) -> None:
        """It arrives on an idle device, is read at once and has its first token when its price has passed."""
        self.arrives(request_id, prompt, **wishes)  # type: ignore[arg-type]
        work = self.plan()
        assert work is not None
        self.passes(work.num_tokens * TOKEN_S)
        self.done(work, **{request_id: token})

    @property
    def num_free(self) -> int:
        return self.scheduler.pages.num_available


def prompt_of(request_id: str, length: int) -> tuple[int, ...]:
    """Tokens that depend on the name, so that no two prompts share a page by accident."""
    start = 1000 * (1 + sum(request_id.encode()))
    return tuple(range(start, start + length))


def prefill(work_id: int, *prompts: tuple[str, tuple[int, ...], tuple[int, ...]]) -> Work:
    """The Work that reads whole prompts: (request, tokens, pages) each."""
    return Work(work_id, "language", tuple(Segment(r, t, 0, 0, p, (len(t) - 1,)) for r, t, p in prompts))


def ending(effects: list[ev.Effect]) -> Record:
    """The record in the only End among the effects."""
    (record,) = [effect.record for effect in effects if isinstance(effect, ev.End)]
    return record
