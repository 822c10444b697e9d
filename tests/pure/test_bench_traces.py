"""Traces as they are published, each in a few rows."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from headway.bench.traces import Asked, Trace, TraceError, read

Told = Callable[..., Trace]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """Reads a text as if it were a file."""

    def read_text(text: str, **options: int) -> Trace:
        path = tmp_path / "trace"
        path.write_text(text, encoding="utf8")
        return read(path, **options)

    return read_text


def test_our_own_columns_with_runs_of_blocks(told: Told) -> None:
    """The blocks' size is in the column's name; the first arrival becomes 0."""
    trace = told("arrival_s,prompt_tokens,output_tokens,block64_hash_runs\n1.5,200,5,0 7-9\n2.0,64,1,0\n")
    assert trace == (
        "headway",
        True,
        [Asked(0.0, 200, 5, "", (0, 7, 8, 9), 64), Asked(0.5, 64, 1, "", (0,), 64)],
    )


def test_lengths_and_kinds_without_arrivals(told: Told) -> None:
    """In the trace's order, which need not be that of the columns; a kind that is none of ours is text."""
    trace = told("order,type,prompt_tokens,output_tokens\n0,image,380,76\n1,Search,9,3\n2,thinking,1,1\n")
    assert trace.timed is False
    assert [(asked.at_s, asked.kind) for asked in trace.requests] == [(0.0, "image"), (0.0, "search"), (0.0, "text")]


def test_azure_with_seven_decimals(told: Told) -> None:
    trace = told(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319600,3180,8\n"
    )
    assert (trace.format, trace.timed) == ("azure", True)
    assert trace.requests[1].at_s == pytest.approx(0.052)
    assert (trace.requests[0].num_prompt, trace.requests[0].num_output) == (4808, 10)


def test_mooncake_is_spread_over_its_three_seconds(told: Told) -> None:
    """What the trace calls one instant stands for three seconds; the order stays, and the seed decides."""
    rows = [f'{{"timestamp": {at}, "input_length": {n}, "output_length": 2, "hash_ids": [0, {n}]}}'
            for n, at in enumerate((0, 0, 0, 3000, 3000, 6000), start=600)]  # fmt: skip
    trace = told("\n".join(rows), seed=1)
    at = [asked.at_s for asked in trace.requests]
    assert [asked.num_prompt for asked in trace.requests] == list(range(600, 606))
    assert at == sorted(at)
    assert at[0] == 0.0
    assert len(set(at)) == 6
    assert at[2] < 3.0 < at[5]
    assert trace.requests[1].blocks == (0, 601)
    assert trace.requests[1].block_tokens == 512
    assert told("\n".join(rows), seed=1) == trace
    assert told("\n".join(rows), seed=2) != trace


def test_bailian_has_kinds_and_small_blocks(told: Told) -> None:
    trace = told(
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 33, "output_length": 9, '
        '"type": "file", "turn": 1, "hash_ids": [5, 6, 7]}\n'
    )
    assert trace == ("bailian", True, [Asked(0.0, 33, 9, "file", (5, 6, 7), 16)])


def test_burstgpt_by_the_names_of_its_columns(told: Told) -> None:
    """Two of its files have more columns; a request without an answer is one that its service failed."""
    short = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    long = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,a,0.5,GPT-4,10,0,10,API log\n7,a,0.5,GPT-4,472,18,490,API log\n"
    )
    assert told(short) == told(long) == ("burstgpt", True, [Asked(0.0, 472, 18)])


def test_servegen_adds_up_its_images(told: Told) -> None:
    trace = told(
        "arrival_s,client,text_tokens,images,image_tokens_each,output_tokens\n0,2,139,2,510 20,26\n1,2,7,0,,1\n"
    )
    assert trace.requests == [Asked(0.0, 669, 26, "image"), Asked(1.0, 7, 1, "text")]


def test_sessions_of_agents_share_nothing_with_each_other(told: Told) -> None:
    """Block 1 of one session is not block 1 of another."""
    trace = told(
        "session,step,t_s,prompt_tokens,output_tokens,block64_hash_runs\na,0,0,70,5,1\na,1,9,140,5,1-2\nb,0,4,70,5,1\n"
    )
    first, other, second = trace.requests
    assert [asked.at_s for asked in trace.requests] == [0.0, 4.0, 9.0]
    assert second.blocks[0] == first.blocks[0] != other.blocks[0]


def test_packed_or_not_is_seen_from_the_content(tmp_path: Path) -> None:
    text = "prompt_tokens,output_tokens\n3,4\n5,6\n"
    (tmp_path / "plain.gz").write_text(text)
    (tmp_path / "packed.csv").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / "plain.gz") == read(tmp_path / "packed.csv")


def test_no_more_rows_are_read_than_asked_for(told: Told) -> None:
    """The bad row is never reached."""
    assert len(told("prompt_tokens,output_tokens\n3,4\n5,6\nbad,row\n", limit=2).requests) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("prompt_tokens,output_tokens\n", "no request"),
        ("a,b\n1,2\n", "line 1: no trace format has these columns: a, b."),
        ('{"a": 1}\n', "line 1: no trace format has these columns: a."),
        ("prompt_tokens,output_tokens\n3,4\n\n5\n", "line 4: not a row of a headway trace (1 cells, not 2)"),
        ("prompt_tokens,output_tokens\n3,-4\n", "line 2: not a row of a headway trace ('-4' is no number of tokens)"),
        ("prompt_tokens,output_tokens\n3,1e3\n", "'1e3' is no number of tokens"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,3,4\n", "'nan' is no instant"),
        ("prompt_tokens,output_tokens,block16_hash_runs\n3,4,9-2\n", "'9-2' is no run of blocks"),
        ("prompt_tokens,output_tokens,block16_hash_runs\n3,4,0-999999999\n", "is no run of blocks"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4}\n{"timestamp"\n', "line 2: not a line of JSON"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4}\n{"timestamp": 1}\n', "'input_length' is missing"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": ["x"]}\n', "no list of block ids"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(told: Told, text: str, says: str) -> None:
    with pytest.raises(TraceError) as error:
        told(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read as a trace: No such file"):
        read(tmp_path / "none")
    (tmp_path / "cut").write_bytes(gzip.compress(b"prompt_tokens,output_tokens\n1,2\n" * 1000)[:40])
    with pytest.raises(TraceError, match="cannot be read as a trace"):
        read(tmp_path / "cut")
