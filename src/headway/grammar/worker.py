"""The process in which strangers' schemas, expressions and grammars are first understood. Started by `check`.

It may use so much memory and so much of a processor and no more; whoever started it kills it when it takes too long.
A frame is four bytes of length (big endian) and that many bytes of msgpack. When the other side hangs up, it leaves.
"""

import os
import resource
import socket
import struct
import sys

import msgspec

from headway.core.request import Constraint
from headway.grammar.limits import ConstraintError
from headway.grammar.matcher import Compiler

MAX_FRAME_BYTES = 256 << 20  # a tokenizer.json may have dozens of megabytes
MEMORY_BYTES = 512 << 20  # beyond what it has when it is ready
CPU_S = 2
NICENESS = 10
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


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    content = receive(connection)
    if content is None:
        return
    vocabulary = msgspec.msgpack.decode(content, type=Vocabulary)
    compiler = Compiler(vocabulary.tokenizer, vocabulary.vocab_size, vocabulary.end_ids)
    os.nice(NICENESS)
    _limit_memory()
    send(connection, Verdict())
    while (content := receive(connection)) is not None:
        _limit_cpu()
        send(connection, _verdict(compiler, msgspec.msgpack.decode(content, type=Constraint)))


def _verdict(compiler: Compiler, constraint: Constraint) -> Verdict:
    try:
        compiler.check(constraint)
    except ConstraintError as error:
        return Verdict(str(error))
    return Verdict()


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as sizes:
            has_bytes = int(sizes.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux: its time is limited all the same
        return
    resource.setrlimit(resource.RLIMIT_AS, (has_bytes + MEMORY_BYTES,) * 2)


def _limit_cpu() -> None:
    """From here on: the system ends it after so many seconds, even if nobody is left to do so."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
