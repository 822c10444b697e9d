"""Loads: lengths, classes, instants and tokens, all from a seed."""

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from headway.bench.load import QWEN_MIX, Load, base_kind, lone_prompt, p90_prompt, prompts, targets
from headway.bench.named import AT, TRACES, drawn, named
from headway.bench.score import quantile
from headway.bench.traces import Asked, Trace
from headway.core.request import SLO


def timed(*requests: Asked) -> Load:
    return Load.of("told", "told", Trace("told", True, list(requests)), len(requests), 0)


THREE = timed(Asked(0.0, 100, 10), Asked(1.0, 200, 20), Asked(4.0, 300, 30))


def test_another_rate_keeps_the_shape_of_bursts() -> None:
    """Two gaps in six seconds are wanted of what had two in four: all gaps grow alike."""
    slower = THREE.at_rate(1 / 3)
    assert THREE.rate == pytest.approx(0.5)
    assert [asked.at_s for asked in slower.requests] == pytest.approx([0.0, 1.5, 6.0])
    assert [asked.at_s for asked in THREE.faster(2).requests] == pytest.approx([0.0, 0.5, 2.0])


def test_lengths_are_scaled_and_never_vanish() -> None:
    scaled = timed(Asked(0.0, 100, 10, "", (1,), 64), Asked(1.0, 3, 1)).scaled(1 / 8)
    assert [(asked.num_prompt, asked.num_output) for asked in scaled.requests] == [(12, 1), (1, 1)]
    assert scaled.requests[0].block_tokens == 8


def test_the_source_tells_all_that_was_done() -> None:
    load = THREE.scaled(0.5).answering(1).within(100).at_rate(2)
    assert load.source == "told; lengths x 0.5; answers of 1; 2 of 3 cut to a context of 100; 2 requests/s"
    assert [asked.num_prompt for asked in load.requests] == [50, 99, 99]


@pytest.mark.parametrize("process", ["poisson", "gamma", "uniform"])
def test_a_process_has_exactly_the_rate_it_was_given(process: str) -> None:
    load = named("qwen", num_requests=300, seed=0).arriving(process, 7.0, 3, cv=3.0)  # type: ignore[arg-type]
    assert load.rate == pytest.approx(7.0)
    assert load == named("qwen", num_requests=300, seed=0).arriving(process, 7.0, 3, cv=3.0)  # type: ignore[arg-type]


def test_how_irregular_a_process_is() -> None:
    """The gaps' coefficient of variation: 0, about 1, about 4."""

    def cv(process: str, cv: float) -> float:
        load = named("qwen", num_requests=4000, seed=0).arriving(process, 1.0, 0, cv)  # type: ignore[arg-type]
        gaps = [b.at_s - a.at_s for a, b in pairwise(load.requests)]
        mean = sum(gaps) / len(gaps)
        return (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean

    assert cv("uniform", 1.0) == pytest.approx(0.0, abs=1e-6)
    assert cv("poisson", 9.0) == pytest.approx(1.0, rel=0.1)
    assert cv("gamma", 4.0) == pytest.approx(4.0, rel=0.2)


def test_one_instant_at_another_rate_is_the_same_draw() -> None:
    load = named("qwen", num_requests=20, seed=0)
    slow, fast = load.at_rate(1), load.at_rate(4)
    assert [a.at_s / 4 for a in slow.requests] == pytest.approx([a.at_s for a in fast.requests])


def test_shared_blocks_are_shared_tokens_and_nothing_else_is() -> None:
    """Two blocks of 64, scaled to 8 tokens each: 16 tokens in common, and no more."""
    load = timed(Asked(0.0, 320, 1, "", (0, 1, 2), 64), Asked(1.0, 320, 1, "", (0, 1, 9), 64)).scaled(1 / 8)
    first, second = prompts(load, 1000, 0)
    assert len(first) == len(second) == 40
    assert first[:16] == second[:16]
    assert sum(a == b for a, b in zip(first[16:], second[16:], strict=True)) <= 2
    assert first[:8] != first[8:16]


def test_blocks_smaller_than_a_token_still_share() -> None:
    load = timed(Asked(0.0, 64, 1, "", (1, 2, 3, 4), 16), Asked(1.0, 64, 1, "", (1, 2, 3, 5), 16)).scaled(1 / 32)
    first, second = prompts(load, 1000, 0)
    assert len(first) == 2
    assert first[0] == second[0]


def test_tokens_follow_from_the_seed_and_stay_in_the_vocabulary() -> None:
    load = named("mooncake", num_requests=40, seed=1).scaled(1 / 64)
    assert prompts(load, 500, 7) == prompts(load, 500, 7)
    assert prompts(load, 500, 7) != prompts(load, 500, 8)
    drawn_tokens = {token for prompt in prompts(load, 500, 7) for token in prompt}
    assert 0 < min(drawn_tokens) < 90
    assert 410 < max(drawn_tokens) < 500
    assert lone_prompt(50, 1, 500, 7) not in (lone_prompt(50, 2, 500, 7), prompts(load, 500, 7)[0][:50])


def test_a_trace_that_is_too_short_goes_on_with_other_tokens() -> None:
    """The second time round, its blocks are new ones; inside the lap they are shared as before."""
    trace = Trace("told", True, [Asked(0.0, 8, 1, "", (1,), 8), Asked(1.0, 8, 1, "", (1,), 8)])
    load = Load.of("told", "told", trace, 4, 0)
    a, b, c, d = prompts(load, 1000, 0)
    assert a == b != c == d
    assert [asked.at_s for asked in load.requests] == [0.0, 1.0, 2.0, 3.0]


def test_another_window_is_other_requests_with_their_own_gaps() -> None:
    """The second window of three, of a trace of five: the fourth, the fifth, and the first again after one gap more."""
    trace = Trace(
        "five", True, [Asked(at_s, tokens, 1) for at_s, tokens in zip((0, 1, 3, 6, 10), range(5), strict=True)]
    )
    second = Load.of("five", "a trace", trace, 3, seed=7, window=1)
    assert [asked.num_prompt for asked in second.requests] == [3, 4, 0]
    assert [asked.at_s for asked in second.requests] == [0.0, 4.0, 6.5]
    assert second.source == "a trace from request 3 on"
    assert Load.of("five", "a trace", trace, 3, seed=7).requests == Load.of("five", "", trace, 3, seed=1).requests


def test_classes_in_other_proportions() -> None:
    """Only requests of that class, at the instants there were."""
    load = named("qwen", num_requests=1000, seed=0)
    mixed = load.mixed({"text": 1, "file": 3}, 5)
    assert mixed.kinds == ("text", "file")
    assert sum(asked.kind == "file" for asked in mixed.requests) / 1000 == pytest.approx(0.75, abs=0.04)
    assert [asked.at_s for asked in mixed.requests] == [asked.at_s for asked in load.requests]
    known = {asked.num_prompt for asked in load.requests if asked.kind == "file"}
    assert {asked.num_prompt for asked in mixed.requests if asked.kind == "file"} <= known
    assert mixed == load.mixed({"text": 1, "file": 3}, 5)


def test_a_request_that_is_drawn_again_is_not_the_same_prompt() -> None:
    """Else a load in other proportions would be found in a cache that the trace itself never fills."""
    pool = tuple(Asked(float(n), 32, 1, "file", (n, 100 + n), 16) for n in range(3))
    texts = tuple(Asked(3.0 + n, 32, 1, "text", (n,), 16) for n in range(37))
    mixed = Load("l", "", pool + texts).mixed({"file": 1.0}, 0)
    assert len({asked.blocks for asked in mixed.requests}) == len(mixed.requests) == 40
    assert {asked.blocks for asked in mixed.requests} > {asked.blocks for asked in pool}


def test_classes_by_length_where_a_trace_has_none() -> None:
    load = timed(*(Asked(float(n), 10 * (9 - n) + 10, 1) for n in range(10)))
    assert load.kinds == ("text",)
    by_length = load.mixed({"text": 0.7, "search": 0.3}, 0)
    assert [asked.kind for asked in by_length.requests] == ["search"] * 3 + ["text"] * 7


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no class 'video'"):
        THREE.mixed({"video": 1}, 0)
    with pytest.raises(ValueError, match="no request of class image, only text"):
        Load("l", "", (Asked(0.0, 1, 1, "text"),)).mixed({"image": 1}, 0)
    with pytest.raises(ValueError, match="has no arrivals"):
        Load.of("l", "", Trace("t", False, [Asked(0.0, 1, 1)]), 3, 0).at_rate(1)
    with pytest.raises(ValueError, match="come at once"):
        timed(Asked(0.0, 1, 1), Asked(0.0, 1, 1)).at_rate(1)
    with pytest.raises(ValueError, match="no load 'nothing'"):
        named("nothing", num_requests=1, seed=0)


@pytest.mark.parametrize("name", TRACES)
def test_stand_ins_have_the_quantiles_that_they_were_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the trace's file: drawn, and the source says so."""
    monkeypatch.delenv("HEADWAY_DATA", raising=False)
    load = named(name, num_requests=4000, seed=2)
    assert "not the trace itself" in load.source
    assert load == named(name, num_requests=4000, seed=2) != named(name, num_requests=4000, seed=3)
    for kind, lengths in TRACES[name].lengths.items():
        some = [asked for asked in load.requests if asked.kind == (kind or "text")]
        for share, expected in list(zip(AT, lengths.prompt, strict=True))[2:4]:
            assert quantile([asked.num_prompt for asked in some], share) == pytest.approx(expected, rel=0.25)
    assert load.rate == pytest.approx(TRACES[name].rate)


def test_the_stand_in_for_mooncake_shares_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an endless cache about as much of the prompts would be found as in the trace: 37%."""
    monkeypatch.delenv("HEADWAY_DATA", raising=False)
    seen: set[int] = set()
    found = total = 0
    for asked in named("mooncake", num_requests=3000, seed=0).requests:
        total += asked.num_prompt
        for block in asked.blocks:
            if block not in seen:
                break
            found += 512
        seen.update(asked.blocks)
    assert found / total == pytest.approx(0.37, abs=0.12)


def test_the_file_itself_where_it_is_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traces").mkdir()
    rows = "type,prompt_tokens,output_tokens\ntext,70,3\nsearch,4000,5\n"
    (tmp_path / "traces" / TRACES["qwen"].file).write_bytes(gzip.compress(rows.encode()))
    monkeypatch.setenv("HEADWAY_DATA", str(tmp_path))
    load = named("qwen", num_requests=6, seed=0)
    assert load.source.startswith(f"trace {TRACES['qwen'].file}; poisson arrivals")
    assert sorted(asked.num_prompt for asked in load.requests) == [70] * 3 + [4000] * 3


def test_a_length_between_two_quantiles() -> None:
    """Half-way between the shares, half-way between the logarithms."""
    assert drawn((10, 10, 100, 400, 400, 400, 400, 400), 0.625) == 200


def test_targets_keep_their_ratio() -> None:
    """Text gets five times its lone TTFT, the others more: 1 to 2 to 16 to 24. TPOT is the same for all."""
    load = named("qwen", num_requests=200, seed=0)
    assert set(load.kinds) == set(QWEN_MIX)
    found = targets(load, 0.1, 5, 0.02, 3)
    assert {kind: slo.ttft_s for kind, slo in found.items()} == pytest.approx(
        {"text": 0.5, "image": 1.0, "search": 8.0, "file": 12.0}
    )
    assert {slo.tpot_s for slo in found.values()} == {0.06}
    assert targets(load, 0.1, 5)["text"] == SLO(ttft_s=0.5)


def test_without_text_the_most_urgent_class_is_the_measure() -> None:
    load = named("qwen", num_requests=300, seed=0).mixed({"search": 1, "file": 1}, 0)
    assert base_kind(load) == "search"
    found = targets(load, 0.1, 5)
    assert [found[kind].ttft_s for kind in ("search", "file")] == pytest.approx([0.5, 0.75])


def test_the_prompt_that_targets_are_made_for() -> None:
    load = timed(*(Asked(float(n), n, 1) for n in range(1, 11)))
    assert p90_prompt(load, "text") == 9
