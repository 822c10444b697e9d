"""The process in which strangers' schemas, expressions and grammars are first understood. Started by `check`.

It may use so much memory and so much of a processor and no more; whoever started it kills it when it takes too long.
When the other side hangs up, it leaves.
"""

import os
import resource
import socket
import sys

import msgspec

from headway.core.request import Constraint
from headway.grammar.frames import Verdict, Vocabulary, receive, send
from headway.grammar.limits import ConstraintError
from headway.grammar.matcher import Compiler

MEMORY_BYTES = 512 << 20  # beyond what it has when it is ready
CPU_S = 2
NICENESS = 10


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    content = receive(connection)
    if content is None:
        return
    vocabulary = msgspec.msgpack.decode(content, type=Vocabulary)
    try:
        compiler = Compiler(vocabulary.tokenizer, vocabulary.vocab_size, vocabulary.end_ids)
    except ValueError as error:
        send(connection, Verdict(f"This model's vocabulary cannot be held to a form: {str(error)[:200]}."))
        return
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
