"""The engine as a process: it answers, it is killed and replaced, it drains, and it says why it cannot start."""

import asyncio
import os
import signal
import time

import pytest

from headway.config import EngineSettings
from headway.core.ledger import Record
from headway.core.request import Request, Sampling
from headway.placement import wire
from headway.placement.supervise import EngineStartError, Supervisor

SETTINGS = EngineSettings(num_threads=1, dtype="float32", max_tile_ms=2.0)


def request(name: str, length: int, max_tokens: int) -> Request:
    prompt = tuple(5 + (7 * place) % 997 for place in range(length))
    return Request(name, prompt, max_tokens, time.monotonic(), sampling=Sampling(temperature=0.0))


async def answer(link: Supervisor, asked: Request, tokens: list[int] | None = None) -> tuple[list[int], Record]:
    """The whole answer; `tokens` is filled as it comes."""
    tokens = [] if tokens is None else tokens
    async for reply in link.submit(asked):
        if isinstance(reply, wire.Ended):
            return tokens, reply.record
        tokens += reply.commit.tokens
    raise AssertionError("a stream that ended without an Ended")


async def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


def all_pages_are_back(link: Supervisor) -> bool:
    beat = link.beat
    return beat is not None and beat.num_running == 0 and beat.pages["held"] == beat.pages["parked"] == 0


def test_a_killed_engine_is_replaced_and_nobody_is_left_waiting():
    """kill -9 with one answer begun and one prompt not begun: the first fails clean, the second is tried again."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            expected, _ = await answer(link, request("before", 30, 8))
            seen: list[int] = []
            begun = asyncio.create_task(answer(link, request("begun", 20, 2000), seen))
            await until(lambda: bool(seen))
            # the engine is stopped, so that what is sent now cannot have begun when it dies
            assert link._process is not None
            os.kill(link._process.pid, signal.SIGSTOP)
            fresh = asyncio.create_task(answer(link, request("fresh", 30, 8)))
            await asyncio.sleep(0.05)
            os.kill(link._process.pid, signal.SIGKILL)
            tokens, record = await asyncio.wait_for(begun, 30)
            assert tokens
            assert (record.kind, record.reason) == ("failed", "engine_lost")
            tokens, record = await asyncio.wait_for(fresh, 60)
            assert (tokens, record.kind) == (expected, "finished")
            assert link.num_restarts == 1
            tokens, _ = await asyncio.wait_for(answer(link, request("after", 30, 8)), 30)
            assert tokens == expected
        finally:
            await link.close()

    asyncio.run(story())


def test_a_caller_who_goes_away_costs_nothing_more():
    """A long answer is cancelled in the middle, another by closing its stream; the pages come back."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            asked = request("long", 900, 1000)
            stream = link.submit(asked)
            await anext(stream)
            link.cancel("long")
            last = [reply async for reply in stream][-1]
            assert isinstance(last, wire.Ended)
            assert last.record.kind == "cancelled"
            left = link.submit(request("left", 900, 1000))
            await anext(left)
            await left.aclose()
            await until(lambda: all_pages_are_back(link))
        finally:
            await link.close()

    asyncio.run(story())


def test_draining_finishes_what_is_open_and_refuses_the_rest():
    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            open_ = asyncio.create_task(answer(link, request("open", 50, 300)))
            await until(lambda: link.beat is not None and link.beat.num_running > 0)
            draining = asyncio.create_task(link.drain(60))
            await asyncio.sleep(0)
            _, late = await answer(link, request("late", 10, 5))
            assert (late.kind, late.reason) == ("refused", "draining")
            tokens, record = await open_
            assert record.kind == "finished"
            assert len(tokens) == 300 or record.reason == "stop"
            await draining
        finally:
            await link.close()
        assert link._process is not None
        assert link._process.poll() is not None

    asyncio.run(story())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (EngineSettings(model="nowhere"), "There is no model 'nowhere'"),
        (EngineSettings(model="random:qwen2.5-0.5b", kv_cache_memory_bytes=1 << 20), "give --max-model-len"),
        (EngineSettings(device="cuda:99"), "--device"),
        (EngineSettings(max_model_len=4096), "give 2048 or less"),
    ],
    ids=["unknown model", "no memory", "no such device", "context too long"],
)
def test_an_engine_that_cannot_start_says_why(settings, sentence):
    async def story() -> None:
        link = Supervisor(settings)
        try:
            with pytest.raises(EngineStartError, match=sentence):
                await asyncio.wait_for(link.start(), 60)
        finally:
            await link.close()

    asyncio.run(story())
