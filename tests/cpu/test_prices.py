"""Prices that are kept from one start of an engine to the next: when they are believed, replaced, or not even read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headway.core.cost import CostFit
from headway.models.presets import preset
from headway.placement import prices
from headway.placement.prices import Kept, Prices, Subject, read, settle, write
from headway.stages.tiling import Rates

FIT = CostFit(step_s=0.004, token_s=1e-4, segment_s=2e-4, pair_s=5e-8)
PRICES = Prices(Rates(4e11, 1.5e10, 2e11, 5e9, 1e8, 1e8, 1e8), FIT, 0.04)


def never() -> Prices:
    raise AssertionError("measured, although kept prices hold")


def test_kept_prices_are_taken_while_they_hold(tmp_path: Path) -> None:
    """The first start measures; the second finds the very same numbers, whatever its probe says within a third."""
    path = tmp_path / "deep" / "er" / "prices.json"
    first, source = settle(path, lambda: PRICES, lambda kept: 1.0)
    assert (first, source) == (PRICES, "measured in 0.0 s")
    for ratio in (0.7, 1.0, 1.3):
        assert settle(path, never, lambda kept, ratio=ratio: ratio) == (PRICES, "cached")
    assert [file.name for file in path.parent.iterdir()] == ["prices.json"], "a temporary file was left"


def test_a_neighbour_does_not_spoil_what_is_kept(tmp_path: Path) -> None:
    """Twice a start is slow: the fast prices stay, and say so. A calm start in between makes it forget that."""
    path = tmp_path / "prices.json"
    settle(path, lambda: PRICES, lambda kept: 1.0)
    slow = "cached; the machine is 3.0 × as slow at present"
    for ratio, source in ((3.0, slow), (3.0, slow), (1.0, "cached"), (3.0, slow), (3.0, slow)):
        assert settle(path, never, lambda kept, ratio=ratio: ratio) == (PRICES, source)


def test_a_machine_that_stays_slow_is_measured_anew(tmp_path: Path) -> None:
    """Slow at three starts in a row: it has changed, and what it does now is what counts."""
    path = tmp_path / "prices.json"
    settle(path, lambda: PRICES, lambda kept: 1.0)
    slower = replace(PRICES, fit=replace(FIT, token_s=3e-4))
    found = [settle(path, lambda: slower, lambda kept: 3.0)[0] for _ in range(3)]
    assert found == [PRICES, PRICES, slower]
    kept = read(path)
    assert kept is not None
    assert (kept.prices, kept.num_slow_starts) == (slower, 0)


def test_a_machine_that_cannot_even_be_measured_keeps_what_it_had(tmp_path: Path) -> None:
    """Slow at four starts in a row, and too busy at the last two for a measurement that is worth anything."""
    path = tmp_path / "prices.json"
    settle(path, lambda: PRICES, lambda kept: 1.0)
    found = [settle(path, lambda: replace(PRICES, error=0.8), lambda kept: 3.0) for _ in range(4)]
    assert found == [(PRICES, "cached; the machine is 3.0 × as slow at present")] * 4


def test_prices_of_a_loaded_start_are_replaced_by_faster_ones(tmp_path: Path) -> None:
    """The first start had a busy neighbour, the second has not: its probe is fast, so it measures."""
    path = tmp_path / "prices.json"
    loaded = replace(PRICES, fit=replace(FIT, token_s=3e-4))
    settle(path, lambda: loaded, lambda kept: 1.0)
    assert settle(path, lambda: PRICES, lambda kept: 0.4) == (PRICES, "measured in 0.0 s")
    assert settle(path, never, lambda kept: 1.0) == (PRICES, "cached")


def test_a_neighbour_that_comes_while_measuring_does_not_count(tmp_path: Path) -> None:
    """The probe was fast, what was measured after it is slower than what was kept: the faster ones stay."""
    path = tmp_path / "prices.json"
    settle(path, lambda: PRICES, lambda kept: 1.0)
    slower = replace(PRICES, fit=replace(FIT, step_s=0.1))
    assert settle(path, lambda: slower, lambda kept: 0.5) == (PRICES, "cached")


def kept_text(**changes: object) -> str:
    good = {
        "format": prices.FORMAT,
        "measured_at": 1.0,
        "num_slow_starts": 0,
        "prices": {
            "rates": dict.fromkeys(Rates.__slots__, 1e9),
            "fit": {"step_s": 1.0, "token_s": 0.1, "segment_s": 0.0, "pair_s": 0.0},
            "error": 0.1,
        },
    }
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"{",
        b"[]",
        b"null",
        kept_text().encode()[:-20],
        kept_text(format=prices.FORMAT + 1).encode(),
        kept_text(prices={}).encode(),
        kept_text().replace('"token_s": 0.1', '"token_s": 0.0').encode(),
        kept_text().replace('"token_s": 0.1', '"token_s": -1.0').encode(),
        kept_text().replace('"token_s": 0.1', '"token_s": NaN').encode(),
        kept_text().replace('"token_s": 0.1', '"token_s": "fast"').encode(),
        kept_text().replace('"linear_flops": 1000000000.0', '"linear_flops": 0.0').encode(),
        kept_text().replace('"error": 0.1', '"error": 0.9').encode(),
    ],
)
def test_a_damaged_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    """Empty, cut off, of a later format, with numbers that cannot be or are of no use: measured anew, and replaced."""
    path = tmp_path / "prices.json"
    path.write_text(kept_text())
    assert read(path) is not None, "the file that is damaged below is a good one"
    path.write_bytes(content)
    assert settle(path, lambda: PRICES, lambda kept: 1.0)[0] == PRICES
    kept = read(path)
    assert kept is not None
    assert kept.prices == PRICES


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    """The cache folder's name is taken by a file."""
    (tmp_path / "costs").write_text("")
    found, source = settle(tmp_path / "costs" / "prices.json", lambda: PRICES, lambda kept: 1.0)
    assert found == PRICES
    assert source.startswith("measured in 0.0 s; not kept (")
    assert write(tmp_path / "prices.json", Kept(prices.FORMAT, 0.0, PRICES)) == ""


def test_prices_that_predict_badly_are_used_and_not_kept(tmp_path: Path) -> None:
    """Measured in the worst of moments: this engine has no better ones, the next start may."""
    path = tmp_path / "prices.json"
    bad = replace(PRICES, error=0.8)
    assert settle(path, lambda: bad, lambda kept: 1.0) == (
        bad,
        "measured in 0.0 s; not kept (the machine was too busy)",
    )
    assert not path.exists()


SUBJECT = Subject(preset("qwen2.5-0.5b"), "torch.float32", "cpu", 2, 16, 10.0, 1056)


@pytest.mark.parametrize(
    "change",
    [
        {"config": preset("qwen3-0.6b")},
        {"config": replace(SUBJECT.config, num_layers=23)},
        {"dtype": "torch.bfloat16"},
        {"device": "NVIDIA H100"},
        {"num_threads": 1},
        {"page_tokens": 32},
        {"max_tile_ms": 5.0},
        {"longest_probe": 64},
    ],
    ids=str,
)
def test_whatever_prices_depend_on_has_a_file_of_its_own(change: dict[str, object]) -> None:
    assert SUBJECT._replace(**change).path != SUBJECT.path


def test_weights_of_the_same_shape_share_a_file() -> None:
    """A fine-tune with another end-of-sequence token, stored in another dtype, costs the same."""
    tuned = replace(SUBJECT.config, eos_ids=(7,), bos_id=None, dtype="float16")
    assert SUBJECT._replace(config=tuned).path == SUBJECT.path


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our own variable first, then XDG's, then the home; a relative path in XDG's is ignored, as it demands."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HEADWAY_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert SUBJECT.path is not None
    assert SUBJECT.path.parent == tmp_path / "own" / "costs"
    monkeypatch.delenv("HEADWAY_CACHE_DIR")
    assert SUBJECT.path.parent == tmp_path / "xdg" / "headway" / "costs"
    for nowhere in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nowhere)
        assert SUBJECT.path.parent == tmp_path / "home" / ".cache" / "headway" / "costs"
