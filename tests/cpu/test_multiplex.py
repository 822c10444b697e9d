"""Two lanes with threads of their own over one set of weights and one pool: the same bits, and everything ends."""

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.bench.replay import replay
from headway.config import ConfigError, EngineSettings
from headway.core import event as ev
from headway.core.cost import CostModel, Share
from headway.core.pages import PageTable
from headway.core.request import Request, Sampling
from headway.core.roofline import Split
from headway.core.scheduler import Scheduler
from headway.core.settings import MAIN, TOKENS
from headway.core.work import Outcome, TokenLogprobs, Work
from headway.llm import LLM
from headway.placement import dividing
from headway.placement.dividing import counts
from headway.placement.driver import DeviceLane, Driver
from headway.placement.engine import Engine, MonotonicClock, build_engine
from headway.placement.mailbox import Letters
from headway.placement.multiplex import Cores, _turn, lanes_of
from headway.stages.language import LanguageStage
from headway.stages.stage import Running, Stage

NUM_THREADS = torch.get_num_threads()


@pytest.fixture(scope="module")
def engine(tiny_folder: object) -> Iterator[Engine]:
    # of a shape that compiled operators take
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder: Path = tiny_folder("llama2", num_hidden_layers=4, head_dim=32, **shape)  # type: ignore[operator]
    built = build_engine(
        EngineSettings(
            model=str(folder),
            lanes="split",
            num_threads=2,
            max_tile_ms=1.0,
            refuse_unattainable=False,
            cost_cache=False,
        )
    )
    yield built
    built.pool.close()
    torch.set_num_threads(NUM_THREADS)


def mixture(seed: int) -> list[Request]:
    """Long answers and long prompts, so that both lanes have something to do most of the time."""
    rng = random.Random(seed)
    return [
        Request(
            f"r{number}",
            tuple(rng.randrange(3, 120) for _ in range(rng.choice((5, 40, 200)))),
            rng.choice((1, 10, 30)),
            0.002 * number,
            sampling=Sampling(temperature=0.0, num_logprobs=5),
        )
        for number in range(12)
    ]


def test_a_roofline_was_measured(engine: Engine) -> None:
    roofline = engine.scheduler.sharing.roofline
    assert roofline is not None
    assert sorted(roofline.powers) == [1, 2]
    assert all(min(power) > 0 for power in roofline.powers.values())
    assert all(0.5 <= factor <= 4 for factors in roofline.friction.values() for factor in factors)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("num_threads", "looked_at"), [(1, (1,)), (2, (1, 2)), (4, (1, 2, 3, 4)), (16, tuple(range(2, 17, 2)))]
)
def test_numbers_of_cores_that_are_looked_at(num_threads: int, looked_at: tuple[int, ...]) -> None:
    """Each with what it leaves of all."""
    found = counts(num_threads)
    assert found == looked_at
    assert all(num_threads - units in found for units in found[:-1])


def test_what_is_measured_is_no_longer_than_a_request_may_be(tiny_folder: object) -> None:
    """Of an engine for short texts: rotations are known for as many positions as it takes, and no more are read."""
    folder: Path = tiny_folder("llama2")  # type: ignore[operator]
    for longest in (64, 200):
        built = build_engine(
            EngineSettings(model=str(folder), lanes="auto", num_threads=2, max_model_len=longest, cost_cache=False)
        )
        assert built.scheduler.sharing.roofline is not None
        built.pool.close()
    torch.set_num_threads(NUM_THREADS)


def test_friction_is_measured_again_where_a_neighbour_was() -> None:
    """The least of three, each lane's for itself; once where there is none to speak of."""
    for seen, kept, num_measured in (
        ([(1.1, 1.0)], (1.1, 1.0), 1),
        ([(1.7, 1.0), (1.0, 1.9)], (1.0, 1.0), 2),
        ([(1.7, 1.3), (1.6, 1.4), (1.5, 1.6), (1.0, 1.0)], (1.5, 1.3), 3),
    ):
        left = list(seen)
        assert dividing.undisturbed(lambda left=left: left.pop(0)) == kept  # type: ignore[misc]
        assert len(seen) - len(left) == num_measured


def test_a_lane_that_breaks_while_it_is_measured_does_not_hang(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is raised where the other one waits for its times."""
    step_s = dividing.step_s

    def breaks(stage: LanguageStage, shape: tuple[Share, ...], name: str = "") -> float:
        if name == "tokens":
            raise MemoryError("no more")
        return step_s(stage, shape, name)

    monkeypatch.setattr(dividing, "step_s", breaks)
    with torch.inference_mode(), pytest.raises(MemoryError, match="no more"):
        dividing.side_by_side(engine.stage, dividing.PROMPT, dividing.TOKENS, Split(1, 1), 2)


class Ear:
    """Keeps what a driver tells."""

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.ends: list[str] = []
        self.over = threading.Event()

    def __call__(self, effect: ev.Admit | ev.Deliver | ev.End) -> None:
        if isinstance(effect, ev.Deliver):
            self.answers.setdefault(effect.commit.request_id, []).extend(effect.commit.tokens)
            self.logprobs.setdefault(effect.commit.request_id, []).extend(effect.commit.logprobs)
        elif isinstance(effect, ev.End):
            self.ends.append(effect.record.request_id)


class Watched:
    """The engine's stage, and how many tiles of it began while another one ran."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.open, self.close, self.drop = stage.open, stage.close, stage.drop
        self.num_beside = self._num_inside = 0
        self._lock = threading.Lock()

    def run(self, work: Work) -> Running:
        tiles = self.stage.run(work)
        try:
            while True:
                with self._lock:
                    self._num_inside += 1
                    self.num_beside += self._num_inside > 1
                try:
                    tile = next(tiles)
                except StopIteration as stop:
                    outcome: Outcome = stop.value
                    return outcome
                finally:
                    with self._lock:
                        self._num_inside -= 1
                yield tile
        finally:
            tiles.close()


def run(engine: Engine, requests: list[Request], lanes: str, leaving: float = 0.0) -> tuple[Ear, Scheduler, int]:
    """All of them at once on the host's clock, read one by one; a share of them is cancelled somewhere on the way.
    Returns also how many tiles ran side by side."""
    rng = random.Random(1)
    ear, letters, clock = Ear(), Letters(), MonotonicClock()
    settings = replace(engine.scheduler.settings, lanes=lanes, pack_tokens=0)
    pages = PageTable(engine.scheduler.pages.num_pages, engine.scheduler.pages.page_tokens)
    cost = CostModel(engine.scheduler.cost.fit)
    scheduler = Scheduler(settings, cost, pages, engine.scheduler.sharing.roofline)
    stage = Watched(engine.stage)
    driver = Driver(scheduler, {"language": stage}, clock, letters, ear, 0.0, devote=Cores().devote)
    with torch.inference_mode(), lanes_of(driver):
        for request in requests:
            letters.put(ev.Arrived(replace(request, arrival=clock.now())))
        leavers = [request.id for request in requests if rng.random() < leaving]

        def leave() -> None:
            for leaver in leavers:
                time.sleep(0.003)
                letters.put(ev.Cancelled(leaver))

        thread = threading.Thread(target=leave)
        thread.start()
        while len(ear.ends) < len(requests):
            if not driver.turn() and len(ear.ends) < len(requests):
                driver.wait()
        thread.join()
    driver.close()
    assert scheduler.num_open == driver.num_open_steps == 0
    scheduler.check_integrity()
    torch.set_num_threads(2)
    return ear, scheduler, stage.num_beside


def test_the_same_bits_as_with_one_lane(engine: Engine) -> None:
    """Whatever runs beside it, an answer is the same, the likeliest tokens' logprobs to the bit where we compile;
    and both did run."""
    requests = mixture(0)
    alone, _, num_beside = run(engine, requests, "turns")
    assert num_beside == 0
    divided, scheduler, num_beside = run(engine, requests, "split")
    assert num_beside > 10, "hardly anything ran side by side: this shows little"
    assert divided.answers == alone.answers
    if "compiled" in engine.facts.operators and engine.facts.linear == "compiled":
        assert divided.logprobs == alone.logprobs
    assert all(len(divided.logprobs[request.id]) == request.max_tokens for request in requests)
    assert sorted(divided.ends) == sorted(request.id for request in requests)
    assert scheduler.sharing.units(MAIN) == 2, "both lanes are idle"


@pytest.mark.parametrize("seed", range(3))
def test_who_leaves_takes_nobody_along(engine: Engine, seed: int) -> None:
    """Half of the callers go while their steps run in either lane: the others' answers are what they are alone."""
    requests = mixture(seed)
    alone, _, _ = run(engine, requests, "turns")
    divided, scheduler, num_beside = run(engine, requests, "split", leaving=0.5)
    assert num_beside > 0
    assert sorted(divided.ends) == sorted(request.id for request in requests), "each once"
    for request_id, answer in divided.answers.items():
        assert answer == alone.answers[request_id][: len(answer)]
    assert scheduler.pages.num_available == scheduler.pages.num_pages


def test_a_replay_leaves_no_thread_behind(engine: Engine) -> None:
    torch.set_num_threads(2)
    cores = os.sched_getaffinity(0)
    ran = replay(engine, mixture(0), engine.scheduler.settings)
    assert len(ran.records) == 12
    assert "tokens" not in [thread.name for thread in threading.enumerate()]
    assert os.sched_getaffinity(0) == cores, "the caller may run where it could before"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(2)


def test_a_lane_that_is_told_to_close_while_it_begins_a_turn_closes() -> None:
    """The turn takes back whatever called the lane before, the call to close included."""
    closing, lane = threading.Event(), DeviceLane(TOKENS)

    class Closed:
        main = DeviceLane(MAIN)

        def turn(self, lane: DeviceLane) -> bool:
            closing.set()
            lane.call()
            lane.awake.clear()
            return False

    thread = threading.Thread(target=_turn, args=(Closed(), lane, closing), daemon=True)
    thread.start()
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_lane_that_breaks_is_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the scheduler's own in the second lane: the first one says so instead of waiting for ever."""
    plan = Scheduler.plan

    def broken(self: Scheduler, now: float, lane: object) -> object:
        if getattr(lane, "name", "") == TOKENS:
            raise RuntimeError("a fault")
        return plan(self, now, lane)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "plan", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        run(engine, mixture(0), "split")
    torch.set_num_threads(2)


def test_an_engine_in_the_callers_process_is_not_divided() -> None:
    with pytest.raises(ConfigError, match="choose 'turns' or 'mixed'"):
        LLM(lanes="auto")
    with pytest.raises(ConfigError, match="leave --preempt chunk out"):
        EngineSettings(lanes="split", preempt="chunk")
