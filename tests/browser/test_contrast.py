"""What is on the page can be seen, in the light and in the dark."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright and Chromium: make test-browser")

from served import answer_is_there, until

if TYPE_CHECKING:
    from playwright.sync_api import Page

Visit = Callable[..., "Page"]
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


def within(name: str) -> str:
    """What calls that function of contrast.js in the page."""
    return f"() => {{ {CONTRAST} return {name}(); }}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_the_light_and_in_the_dark(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    page.click("#run-code")
    answer_is_there(page, "#answer")
    page.locator("#past .opener").first.click()
    page.locator(".life .phases i").first.wait_for()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 60) == (scheme == "dark")
    for name in ("code", "chat", "fill"):
        page.click(f"#tab-{name}")
        assert page.evaluate(within("faintText")) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_shapes_can_be_seen_in_the_light_and_in_the_dark(visit: Visit, scheme: str) -> None:
    """Those of charts, of the device and of boxes; and no line is known by its colour alone."""
    page = visit(color_scheme=scheme)
    page.click("#run-code")
    answer_is_there(page, "#answer")
    until(page, "document.querySelector('#attained .u-legend')?.textContent.includes('custom')")
    found = page.evaluate(within("shapes"))
    assert {"pages cached", "pages held", "queue running", "attained custom", "device plain", "s-cached"} <= set(found)
    assert {name: ratio for name, (ratio, least) in found.items() if ratio < least} == {}
    strokes = page.evaluate(
        "() => [...document.querySelectorAll('#pages .u-marker')].map(mark => getComputedStyle(mark).borderTopStyle)"
    )
    assert len(set(strokes)) == len(strokes) == 3
