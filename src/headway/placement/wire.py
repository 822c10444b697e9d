"""What the door and an engine say to each other: length-prefixed msgpack, typed on both sides, never pickled.

A frame is four bytes of length (big endian) and that many bytes of one tagged message. The socket is one end of an
unnamed pair handed to the engine at its start, so nobody else can connect to it.
"""

import struct
from typing import NamedTuple

import msgspec

from headway.core.cost import CostFit
from headway.core.ledger import Record
from headway.core.request import Request
from headway.core.work import Commit
from headway.placement.spans import Span

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class Submit(msgspec.Struct, tag=True):
    request: Request


class Cancel(msgspec.Struct, tag=True):
    """The caller went away: end it as cancelled."""

    request_id: str


class Stop(msgspec.Struct, tag=True):
    """The door saw a stop string: end it as finished."""

    request_id: str


class Drain(msgspec.Struct, tag=True):
    """Admit nothing more, finish what is open, then leave."""


ToEngine = Submit | Cancel | Stop | Drain


class EngineFacts(msgspec.Struct, frozen=True):
    """What the engine resolved at its start; printed, and used by the door to refuse early."""

    model_name: str
    device: str
    dtype: str
    dtype_reason: str
    num_parameters: int
    max_model_len: int
    max_num_seqs: int
    page_tokens: int
    num_pages: int
    pool_bytes: int
    num_threads: int
    max_tile_ms: float
    load_s: float
    cost_fit: CostFit = CostFit()  # what steps are predicted by at the start
    cost_error: float = 0.0  # its mean absolute relative error on steps that it was not fitted to
    cost_source: str = ""  # "measured in 1.4 s", "cached" …
    pack_tokens: int = 16  # so many at most are read together by prompts that share a step
    hidden_size: int = 0  # of an embedding
    linear: str = "torch's"  # by whom matrices are multiplied
    operators: str = "torch's"  # those that are not linear: torch's, or compiled for some kind of processor

    @property
    def means(self) -> str:
        """By which steps are computed, in words."""
        return f"{self.dtype}, {self.num_threads} threads, linear operators {self.linear}, others {self.operators}"


class Ready(msgspec.Struct, tag=True):
    facts: EngineFacts


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot start; `message` is one sentence that says what to do."""

    message: str


class Admitted(msgspec.Struct, tag=True):
    """The request is in the queue; its first token is expected so many seconds after its arrival."""

    request_id: str
    predicted_ttft_s: float


class Delivered(msgspec.Struct, tag=True):
    """New tokens of one request."""

    commit: Commit


class Ended(msgspec.Struct, tag=True):
    """The last message about a request."""

    record: Record


class Beat(msgspec.Struct, tag=True):
    """Sent at events (at most ten a second) and at least once a second: the engine is alive, and this is its state."""

    now: float
    num_running: int
    num_waiting: int
    num_parked: int
    pages: dict[str, int]  # state -> count
    counters: dict[str, float]  # running totals: events, plans, tiles, preemptions, prefix_queries, prefix_hits …
    step_sizes: dict[int, int] = {}  # n -> steps done, ever, of at most 2**n tokens and more than half as many


class Ran(msgspec.Struct, tag=True):
    """What the device did since the last of these, sent at most ten times a second; and the steps that have it now,
    one in each lane."""

    spans: tuple[Span, ...]
    running: tuple[Span, ...]


FromEngine = Ready | StartFailed | Admitted | Delivered | Ended | Beat | Ran

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """One message, ready to be written to the socket."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Frames(NamedTuple):
    """Cuts a byte stream into message bodies."""

    buffer: bytearray

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes; returns the bodies that are now whole. Raises ValueError on an impossible length."""
        source: bytes | bytearray = data  # mostly it holds whole frames: then they are cut from it without a copy
        if not self.buffer and len(data) >= _LENGTH.size:  # and most often a single one
            (length,) = _LENGTH.unpack_from(data)
            if len(data) == _LENGTH.size + length <= _LENGTH.size + MAX_FRAME_BYTES:
                return [data[_LENGTH.size :]]
        else:
            self.buffer.extend(data)
            source = self.buffer
        bodies, at = [], 0
        while len(source) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(source, at)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            begin, end = at + _LENGTH.size, at + _LENGTH.size + length
            if len(source) < end:
                break
            bodies.append(bytes(source[begin:end]))
            at = end
        if source is data:
            self.buffer.extend(data[at:])
        else:
            del self.buffer[:at]
        return bodies
