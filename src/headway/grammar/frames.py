"""What `check` and its worker say to each other: four bytes of length (big endian), and that many bytes of msgpack."""

import socket
import struct

import msgspec

from headway.core.request import Constraint

MAX_FRAME_BYTES = 256 << 20  # a tokenizer.json may have dozens of megabytes
_LENGTH = struct.Struct(">I")


class Vocabulary(msgspec.Struct):
    """The first message: for which model."""

    tokenizer: str  # the text of a tokenizer.json
    vocab_size: int
    end_ids: tuple[int, ...]


class Verdict(msgspec.Struct):
    """What is wrong, or nothing; also the sign that it is ready."""

    complaint: str = ""


def send(connection: socket.socket, message: Vocabulary | Verdict | Constraint) -> None:
    body = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> bytes | None:
    """The next frame's body; None if the other side has hung up. Raises ValueError on an impossible length."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, num_bytes: int) -> bytes | None:
    content = bytearray()
    while len(content) < num_bytes:
        part = connection.recv(min(num_bytes - len(content), 1 << 20))
        if not part:
            return None
        content += part
    return bytes(content)
