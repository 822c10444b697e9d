"""What door and engine say to each other survives any cut of the byte stream, and nothing else gets through."""

import struct
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.ledger import Record
from headway.core.request import SLO, Constraint, Request, Sampling
from headway.core.work import Commit, Failure, TokenLogprobs
from headway.placement import wire
from headway.placement.spans import Span

INTS = st.integers(-(2**31), 2**31)
COUNTS = st.integers(0, 2**31)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(max_size=12)
SECONDS = st.none() | FLOATS

slos = st.builds(SLO, SECONDS, SECONDS, SECONDS)
samplings = st.builds(
    Sampling,
    temperature=FLOATS,
    top_k=INTS,
    logit_bias=st.lists(st.tuples(COUNTS, FLOATS), max_size=3).map(tuple),
    seed=st.integers(0, 2**63 - 1),
    num_logprobs=st.none() | COUNTS,
    num_prompt_logprobs=st.none() | COUNTS,
    constraint=st.none() | st.builds(Constraint, st.sampled_from(["json", "regex", "choice", "lark"]), TEXT),
)
requests = st.builds(
    Request,
    id=TEXT,
    prompt=st.lists(COUNTS, max_size=5).map(tuple),
    max_tokens=COUNTS,
    arrival=FLOATS,
    slo=slos,
    sampling=samplings,
    stop_ids=st.lists(COUNTS, max_size=3).map(tuple),
    min_tokens=COUNTS,
    priority=INTS,
    tenant=TEXT,
    adapter=st.none() | TEXT,
)
logprobs = st.builds(TokenLogprobs, FLOATS, st.lists(st.tuples(COUNTS, FLOATS), max_size=2).map(tuple))
several_logprobs = st.lists(logprobs, max_size=3).map(tuple)
commits = st.builds(
    Commit,
    TEXT,
    st.lists(COUNTS, max_size=3).map(tuple),
    several_logprobs,
    prompt_logprobs=several_logprobs,
    vector=st.lists(FLOATS, max_size=3).map(tuple),
    failure=st.none() | st.builds(Failure, TEXT, TEXT),
    complete=st.booleans(),
)
records = st.builds(
    Record,
    request_id=TEXT,
    arrival=FLOATS,
    slo=slos,
    num_prompt_tokens=COUNTS,
    first_token=SECONDS,
    kind=st.sampled_from([None, "finished", "refused", "cancelled", "failed"]),
    message=TEXT,
    stop_id=st.none() | COUNTS,
    retry_after_s=SECONDS,
    missed=st.dictionaries(st.sampled_from(["ttft", "tpot", "total"]), st.sampled_from(["parked", "infeasible"])),
)
facts = st.builds(
    wire.EngineFacts,
    model_name=TEXT,
    device=TEXT,
    dtype=TEXT,
    dtype_reason=TEXT,
    num_parameters=COUNTS,
    max_model_len=COUNTS,
    max_num_seqs=COUNTS,
    page_tokens=COUNTS,
    num_pages=COUNTS,
    pool_bytes=COUNTS,
    num_threads=COUNTS,
    max_tile_ms=FLOATS,
    load_s=FLOATS,
)
beats = st.builds(
    wire.Beat,
    now=FLOATS,
    num_running=COUNTS,
    num_waiting=COUNTS,
    num_parked=COUNTS,
    pages=st.dictionaries(TEXT, COUNTS, max_size=4),
    counters=st.dictionaries(TEXT, FLOATS, max_size=4),
    step_sizes=st.dictionaries(st.integers(0, 40), COUNTS, max_size=4),
)
spans = st.builds(
    Span,
    COUNTS,
    FLOATS,
    FLOATS,
    st.sampled_from(["prefill", "decode", "mixed"]),
    COUNTS,
    COUNTS,
    st.lists(TEXT, max_size=4).map(tuple),
    st.sampled_from([None, "done", "suspended", "left", "failed"]),
    st.booleans(),
)
to_engine = st.one_of(
    st.builds(wire.Submit, requests), st.builds(wire.Cancel, TEXT), st.builds(wire.Stop, TEXT), st.builds(wire.Drain)
)
from_engine = st.one_of(
    st.builds(wire.Ready, facts),
    st.builds(wire.StartFailed, TEXT),
    st.builds(wire.Delivered, commits),
    st.builds(wire.Ended, records),
    beats,
    st.builds(wire.Ran, st.lists(spans, max_size=3).map(tuple), st.lists(spans, max_size=2).map(tuple)),
)


def in_chunks(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The stream, cut at these places."""
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@settings(deadline=None)
@given(st.lists(to_engine, max_size=5), st.lists(st.integers(0, 600), max_size=12))
def test_what_the_door_says_arrives(messages: list[wire.ToEngine], cuts: list[int]) -> None:
    """The kernel hands over any bytes it likes at a time, half a length field or three messages at once."""
    frames = wire.Frames(bytearray())
    stream = b"".join(map(wire.frame, messages))
    heard = [wire.to_engine_decoder.decode(body) for chunk in in_chunks(stream, cuts) for body in frames.feed(chunk)]
    assert heard == messages
    assert frames.buffer == b""


@settings(deadline=None)
@given(st.lists(from_engine, max_size=5), st.lists(st.integers(0, 600), max_size=12))
def test_what_the_engine_says_arrives(messages: list[wire.FromEngine], cuts: list[int]) -> None:
    """The same the other way: facts, tokens with logprobs, records and signs of life."""
    frames = wire.Frames(bytearray())
    stream = b"".join(map(wire.frame, messages))
    heard = [wire.from_engine_decoder.decode(body) for chunk in in_chunks(stream, cuts) for body in frames.feed(chunk)]
    assert heard == messages
    assert frames.buffer == b""


def test_one_byte_at_a_time() -> None:
    """The slowest of all sockets: nothing is a message until its last byte is there."""
    frames = wire.Frames(bytearray())
    stream = wire.frame(wire.Cancel("r1"))
    assert [frames.feed(stream[place : place + 1]) for place in range(len(stream) - 1)] == [[]] * (len(stream) - 1)
    (body,) = frames.feed(stream[-1:])
    assert wire.to_engine_decoder.decode(body) == wire.Cancel("r1")


def test_an_impossible_length_is_refused_before_its_bytes_come() -> None:
    """Four bytes claim that 64 MiB and one byte follow: no memory is spent on waiting for them."""
    frames = wire.Frames(bytearray())
    with pytest.raises(ValueError, match="over the limit"):
        frames.feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))


def test_a_message_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender notices it, not the receiver."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    assert wire.frame(wire.StartFailed("x" * 10))
    with pytest.raises(ValueError, match="over the limit"):
        wire.frame(wire.StartFailed("x" * 100))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"cos\nsystem\n(S'true'\ntR.",
        msgspec.msgpack.encode({"type": "Nonsense"}),
        msgspec.msgpack.encode({"type": "Cancel"}),
        msgspec.msgpack.encode({"type": "Cancel", "request_id": 7}),
        msgspec.msgpack.encode({"type": "Ended", "record": None}),
    ],
)
def test_garbage_is_refused(body: bytes) -> None:
    """No message, half a message, somebody else's message, or a pickle: an error, never an object."""
    with pytest.raises(msgspec.DecodeError):
        wire.to_engine_decoder.decode(body)
    with pytest.raises(msgspec.DecodeError):
        wire.from_engine_decoder.decode(body)


@given(st.binary(max_size=60))
def test_random_bytes_never_do_harm(body: bytes) -> None:
    """Whatever the bytes, the decoder answers with a message or with its own error."""
    try:
        message = wire.to_engine_decoder.decode(body)
    except msgspec.DecodeError:
        return
    assert isinstance(message, wire.ToEngine)


def test_each_side_understands_only_what_is_meant_for_it() -> None:
    """An engine that is sent an engine's message says so."""
    with pytest.raises(msgspec.ValidationError):
        wire.to_engine_decoder.decode(wire.frame(wire.StartFailed("no"))[4:])
    with pytest.raises(msgspec.ValidationError):
        wire.from_engine_decoder.decode(wire.frame(wire.Drain())[4:])
