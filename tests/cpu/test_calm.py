"""Which measurements count on a machine that is shared: those beside which it had its usual speed."""

from collections.abc import Iterator

import pytest

from headway.bench.calm import MAX_TRIES, Calm


def calm(monkeypatch: pytest.MonkeyPatch, *probes: float) -> Calm:
    """Its probes take a second each at the start, and then as long as said, two for each measurement."""

    def taken() -> Iterator[float]:
        yield from probes

    coming = taken()
    monkeypatch.setattr(Calm, "_probe", lambda self: 1.0)
    made = Calm()
    monkeypatch.setattr(Calm, "_probe", lambda self: next(coming))
    return made


@pytest.mark.parametrize("speed", [1.5, 0.6])
def test_a_disturbed_measurement_is_made_again(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    """Slower afterwards, or faster before than usual: the second measurement, beside which nothing was odd, counts."""
    for probes in ((1.0, speed), (speed, 1.0)):
        figures = iter([10.0, 20.0])
        watched = calm(monkeypatch, *probes, 1.1, 0.9)
        assert watched.measure(lambda figures=figures: next(figures)) == 20.0  # type: ignore[misc]
        assert (watched.num_discarded, watched.num_kept_disturbed) == (1, 0)


def test_a_clock_that_has_drifted_becomes_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine turns half as fast and stays so: three tries are thrown away, and then that is the usual speed."""
    watched = calm(monkeypatch, *[2.0] * 40)
    for _ in range(4):
        watched.measure(lambda: 1.0)
    assert watched.num_kept_disturbed == 0
    assert watched.num_discarded == MAX_TRIES - 1
