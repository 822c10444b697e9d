"""The page about predictions: what it runs, and how its figures are made of single steps."""

import pytest

from headway.bench.prediction import Case, Judged, by_case, by_group, cases, mape
from headway.core.cost import Share
from headway.placement.fitting import shapes


@pytest.mark.parametrize("longest", [256, 2048])
def test_nothing_is_judged_that_was_fitted_to(longest: int) -> None:
    """Every group is there, nothing is longer than asked, and no step is among those that the fit was made from."""
    chosen = cases(longest)
    fitted = {shape for shape, is_held_out in shapes(longest) if not is_held_out}
    assert not fitted & {case.shape for case in chosen}
    assert max(sum(share) for case in chosen for share in case.shape) <= longest
    assert len({case.group for case in chosen}) == 5
    assert len({case.name for case in chosen}) == len(chosen)


def test_figures_are_those_of_the_steps() -> None:
    """Twice as long as predicted is 50 % off, half as long 100 %; a group's figure is the mean of its own steps."""
    long, short = (Case("whole prompts", name, (Share(8, 0),)) for name in ("long", "short"))
    pack = Case("packs of prompts", "1 + 1", (Share(1, 0),) * 2)
    judged = [
        Judged(long, fitted_s=1.0, corrected_s=2.0, taken_s=2.0, covered=True),
        Judged(short, fitted_s=1.0, corrected_s=0.5, taken_s=0.5, covered=True),
        Judged(pack, fitted_s=1.0, corrected_s=0.75, taken_s=1.0, covered=False),
    ]
    assert mape([(1.0, 2.0), (1.0, 0.5)]) == 0.75
    assert by_group(judged) == [
        ["whole prompts", "2", "75.0%", "0.0%", "2 of 2"],
        ["packs of prompts", "1", "0.0%", "25.0%", "0 of 1"],
        ["all", "3", "50.0%", "8.3%", "2 of 3"],
    ]
    assert by_case(judged)[0] == ["whole prompts", "long", "2000", "1000 (-50%)", "2000 (+0%)"]
