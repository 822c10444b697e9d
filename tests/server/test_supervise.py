"""The engine as a process: it answers, dies or hangs and is replaced, drains, and says why it cannot start."""

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from headway.config import EngineSettings
from headway.core.ledger import Record
from headway.core.request import SLO, Request, Sampling
from headway.placement import process, supervise, wire
from headway.placement.supervise import EngineStartError, Reply, Supervisor

SETTINGS = EngineSettings(num_threads=1, dtype="float32", max_tile_ms=2.0)


def request(name: str, length: int, max_tokens: int) -> Request:
    prompt = tuple(5 + (7 * place) % 997 for place in range(length))
    return Request(name, prompt, max_tokens, time.monotonic(), sampling=Sampling(temperature=0.0))


async def answer(link: Supervisor, asked: Request, tokens: list[int] | None = None) -> tuple[list[int], Record]:
    """The whole answer; `tokens` is filled as it comes."""
    tokens = [] if tokens is None else tokens
    async with aclosing(replies(link, asked)) as heard:
        async for reply in heard:
            if isinstance(reply, wire.Ended):
                return tokens, reply.record
            if isinstance(reply, wire.Delivered):
                tokens += reply.commit.tokens
    raise AssertionError("a stream that ended without an Ended")


async def replies(link: Supervisor, asked: Request) -> AsyncGenerator[Reply, None]:
    """Up to the last; closed before, it cancels the request."""
    heard: asyncio.Queue[Reply] = asyncio.Queue()
    link.submit(asked, heard.put_nowait)
    reply = None
    try:
        while not isinstance(reply, wire.Ended):
            reply = await heard.get()
            yield reply
    finally:
        if not isinstance(reply, wire.Ended):
            link.cancel(asked.id)


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


def test_a_hung_engine_is_replaced(monkeypatch):
    """It does not die, it only says nothing more (here it is stopped): whoever waits is answered by the next one."""
    monkeypatch.setattr(supervise, "SILENCE_S", 2.0)

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            assert link._process is not None
            hung = link._process
            os.kill(hung.pid, signal.SIGSTOP)
            tokens, record = await asyncio.wait_for(answer(link, request("patient", 30, 5)), 60)
            assert tokens
            assert record.kind == "finished"
            assert hung.poll() == -signal.SIGKILL
            assert link.num_restarts >= 1
        finally:
            await link.close()

    asyncio.run(story())


def test_a_door_that_was_itself_stopped_does_not_blame_the_engine():
    """When it goes on, its patience is over, but what the engine said meanwhile lies there to be read."""

    async def story() -> None:
        ours, engine = socket.socketpair()
        heard: list[wire.FromEngine] = []
        _, line = await asyncio.get_running_loop().create_connection(lambda: supervise.Line(heard.append), sock=ours)
        listening = asyncio.create_task(line.listen(lambda: 0.2))
        await asyncio.sleep(0)
        time.sleep(0.3)  # the whole loop stands still
        beat = wire.Beat(1.0, 0, 0, 0, {}, {})
        engine.send(wire.frame(beat))
        await asyncio.sleep(0.03)
        with engine:
            assert heard == [beat]
            assert not listening.done()
            with pytest.raises(TimeoutError):  # but silence is silence
                await listening
            line.close()

    asyncio.run(story())


def hear_out(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def test_an_engine_whose_loop_hangs_stops_its_beats(monkeypatch):
    """The writing thread is well, the loop is not: while it works without finishing a tile, nothing is heard."""
    monkeypatch.setattr(process, "STUCK_S", 0.5)
    monkeypatch.setattr(process, "BEAT_S", 0.04)
    door, engine = socket.socketpair()
    door.settimeout(1.0)
    frames = wire.Frames(bytearray())
    num_tiles = 7
    mouth = process.Mouth(engine)
    mouth.beat = wire.Beat(0.0, 0, 0, 0, {}, {})
    mouth.open(lambda: num_tiles)
    try:
        for _ in range(20):  # at rest no tile is finished either, and that is no fault
            assert frames.feed(door.recv(1 << 16))
        mouth.working = True
        with pytest.raises(TimeoutError):
            hear_out(door)
        num_tiles = 8
        assert door.recv(1 << 16)
    finally:
        mouth.close()
        door.close()
        engine.close()


def test_what_a_step_says_is_written_at_once():
    """All that was said before the writer woke up goes out in one piece, in order, and closing loses nothing."""
    door, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps what was written apart
    said = [wire.StartFailed(str(place)) for place in range(5)]
    mouth = process.Mouth(engine)
    for message in said:
        mouth.say(message)
    mouth.open(lambda: 0)
    with door, engine:
        bodies = wire.Frames(bytearray()).feed(door.recv(1 << 16))
        assert [wire.from_engine_decoder.decode(body) for body in bodies] == said
        mouth.say(said[0])
        mouth.close()
        assert door.recv(1 << 16) == wire.frame(said[0])


def test_a_caller_who_goes_away_while_the_engine_starts_is_never_served():
    """One cancels, one closes its stream, one stays: the engine, when it comes, sees only the last."""
    submitted: list[str] = []

    class Overheard(Supervisor):
        def _say(self, message: wire.ToEngine) -> None:
            if isinstance(message, wire.Submit):
                submitted.append(message.request.id)
            super()._say(message)

    async def story() -> None:
        link = Overheard(SETTINGS)
        starting = asyncio.create_task(link.start())
        try:
            gone = asyncio.create_task(answer(link, request("gone", 30, 1500)))
            left = asyncio.create_task(answer(link, request("left", 30, 1500)))
            stays = asyncio.create_task(answer(link, request("stays", 30, 5)))
            await asyncio.sleep(0)
            link.cancel("gone")
            left.cancel()
            tokens, record = await gone
            assert link.state == "starting"
            assert (tokens, record.kind) == ([], "cancelled")
            await starting
            _, record = await stays
            assert record.kind == "finished"
            assert submitted == ["stays"]
        finally:
            await link.close()

    asyncio.run(story())


def test_who_waits_for_an_engine_waits_within_bounds():
    """While none is ready: no more than may wait at all, no longer than its target, and nobody once it is leaving."""

    async def story() -> None:
        link = Supervisor(dataclasses.replace(SETTINGS, max_num_queued_reqs=3))
        hasty = dataclasses.replace(request("hasty", 3, 5), slo=SLO(ttft_s=0.05))
        due = dataclasses.replace(request("due", 3, 5), slo=SLO(total_s=0.1))
        waiting = [asyncio.create_task(answer(link, one)) for one in (hasty, due, request("patient", 3, 5))]
        await asyncio.sleep(0)
        _, record = await answer(link, request("fourth", 3, 5))
        assert (record.kind, record.reason) == ("refused", "queue_full")
        for task in waiting[:2]:
            _, record = await asyncio.wait_for(task, 20)
            assert (record.kind, record.reason) == ("refused", "deadline_expired")
            assert record.retry_after_s is not None
        leaving = asyncio.create_task(link.drain(0.05))
        await asyncio.sleep(0)
        _, record = await answer(link, request("newcomer", 3, 5))
        assert (record.kind, record.reason) == ("refused", "draining")
        await leaving
        assert not waiting[2].done(), "who was there before may still be answered"
        await link.close()
        _, record = await waiting[2]
        assert (record.kind, record.reason) == ("failed", "shutdown")

    asyncio.run(story())


def test_a_cancelled_call_gets_no_second_try():
    """Its engine is killed before it could say that the call is cancelled."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            assert link._process is not None
            os.kill(link._process.pid, signal.SIGSTOP)
            fresh = asyncio.create_task(answer(link, request("fresh", 30, 1500)))
            await asyncio.sleep(0.05)
            link.cancel("fresh")
            os.kill(link._process.pid, signal.SIGKILL)
            tokens, record = await asyncio.wait_for(fresh, 30)
            assert (tokens, record.kind, record.reason) == ([], "cancelled", "cancelled")
            assert link.state == "starting"
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
            stream = replies(link, asked)
            await anext(stream)
            link.cancel("long")
            last = [reply async for reply in stream][-1]
            assert isinstance(last, wire.Ended)
            assert last.record.kind == "cancelled"
            left = replies(link, request("left", 900, 1000))
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
            seen: list[int] = []
            open_ = asyncio.create_task(answer(link, request("open", 50, 300), seen))
            await until(lambda: bool(seen))  # between two beats it may have begun and ended
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


def test_signals_to_the_server_leave_the_engine_to_finish():
    """A terminal or a service manager signals every process it knows of; the engine heeds the door alone."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            assert link._process is not None
            assert os.getpgid(link._process.pid) != os.getpgid(0)
            seen: list[int] = []
            open_ = asyncio.create_task(answer(link, request("open", 50, 300), seen))
            await until(lambda: bool(seen))
            draining = asyncio.create_task(link.drain(60))
            await asyncio.sleep(0)
            for number in (signal.SIGTERM, signal.SIGINT):
                os.killpg(link._process.pid, number)
            _, record = await open_
            assert record.kind == "finished"
            await draining
        finally:
            await link.close()

    asyncio.run(story())


def test_what_is_open_when_the_time_to_drain_is_over_ends_as_shutdown():
    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        seen: list[int] = []
        open_ = asyncio.create_task(answer(link, request("open", 50, 1900), seen))
        try:
            await until(lambda: bool(seen))
            await link.drain(0.0)
        finally:
            await link.close()
        _, record = await open_
        assert (record.kind, record.reason) == ("failed", "shutdown")
        assert "shut down" in record.message

    asyncio.run(story())


def test_an_engine_that_cannot_start_again_says_why(caplog):
    """The model's folder went away while the server ran, and then the engine died."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            link.settings = dataclasses.replace(SETTINGS, model="/nowhere/at-all")
            assert link._process is not None
            link._process.kill()
            await until(lambda: link.state == "down")
            assert "/nowhere/at-all" in caplog.messages[-1]
        finally:
            await link.close()

    asyncio.run(story())


def test_an_engine_that_talks_nonsense_is_replaced():
    """A frame that is no message is like a broken socket: that engine is ended, the next one answers."""

    async def story() -> None:
        link = Supervisor(SETTINGS)
        await link.start()
        try:
            assert link._line is not None
            link._line.data_received(b"\x00\x00\x00\x02\xc1\xc1")
            tokens, record = await asyncio.wait_for(answer(link, request("patient", 30, 5)), 60)
            assert tokens
            assert record.kind == "finished"
            assert link.num_restarts == 1
        finally:
            await link.close()

    asyncio.run(story())


def test_the_current_directory_is_not_imported_from(tmp_path, monkeypatch):
    """The server is started in a folder that happens to hold a torch.py."""
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        link = Supervisor(SETTINGS)
        try:
            await asyncio.wait_for(link.start(), 60)
        finally:
            await link.close()

    asyncio.run(story())


def test_memory_that_is_refused_is_told_in_one_sentence():
    """The host has enough, but this process may not take it (as under `ulimit -v`): found out only when loading."""
    code = """
import resource
from headway.config import ConfigError, EngineSettings
from headway.placement.engine import build_engine
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    build_engine(EngineSettings(model="random:qwen2.5-0.5b", dtype="bfloat16", num_threads=1, max_model_len=64))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("There is not enough memory"), done.stderr
    assert done.stdout.count("\n") == 1


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
