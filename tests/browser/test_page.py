"""The page in a real browser: it streams, judges, shows suspensions, and can be used by keyboard, in the dark, on a
phone. It also takes the pictures that the README shows."""

import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright and Chromium: make test-browser")

from served import ROOT, Server, answer_is_there, until

if TYPE_CHECKING:
    from playwright.sync_api import Page

Visit = Callable[..., "Page"]


def show_a_suspension(page: "Page") -> None:
    """What the page shows on demand. A short one may be refused; the browser calls that an error, the page does not."""
    page.click("#show")
    until(page, "!document.getElementById('show').disabled")
    page.wrong[:] = [text for text in page.wrong if "429" not in text]


def test_it_loads_without_an_error_and_asks_nobody_else(visit: Visit, server: Server) -> None:
    """Whatever is wrong is found when the visit ends. The engine, its figures and three curves are there."""
    page = visit()
    assert page.title() == "Headway"
    assert page.locator("#model").inner_text().startswith("embedded")
    until(page, "document.getElementById('s-pages').textContent.includes(' of ')")
    until(page, "document.querySelectorAll('.curve canvas').length === 3")
    kept_out = page.evaluate("() => fetch('https://example.org/').then(() => 'reached', () => 'refused')")
    assert kept_out == "refused"
    refused = [text for text in page.wrong if "example.org" in text]
    assert any("Content Security Policy" in text for text in refused), "the policy, not the missing network"
    page.wrong[:] = [text for text in page.wrong if text not in refused]


def test_an_answer_streams_and_is_judged_and_its_life_can_be_opened(visit: Visit) -> None:
    page = visit()
    page.evaluate(
        "() => { window.lengths = new Set(); new MutationObserver(() => "
        "window.lengths.add(document.querySelector('#answer .new')?.textContent.length))"
        ".observe(document.getElementById('answer'), {childList: true, subtree: true}); }"
    )
    page.fill("#prompt", "def parse_header(line):")
    page.click("#run-code")
    assert len(answer_is_there(page, "#answer")) > 10
    assert page.evaluate("window.lengths.size") > 5, "it came in pieces"
    row = page.locator("#past tr[data-request]").first
    row.locator(".verdict.met").wait_for()
    until(page, "/^#\\d+ /.test(document.querySelector('#past .serial').textContent)")
    row.locator(".opener").click()
    life = page.locator("#past tr.life")
    life.locator(".phases i.answering").wait_for()
    assert life.locator(".phases i.reading").count() >= 1
    words = life.locator("ol").inner_text()
    assert "first token" in words
    assert "finished" in words
    assert life.locator(".phases").get_attribute("aria-label").startswith("waiting")
    row.locator(".opener").click()
    assert life.count() == 0


def test_what_is_refused_is_said_in_the_words_of_the_server(visit: Visit) -> None:
    """A prompt longer than the model's context; the browser calls a 400 an error too."""
    page = visit()
    page.fill("#prompt", "word " * 4000)
    page.click("#run-code")
    page.locator("#error:visible").wait_for()
    assert "token" in page.locator("#error").inner_text()
    assert page.locator("#past .verdict").first.inner_text() == "no answer"
    page.wrong[:] = [text for text in page.wrong if "400" not in text and "404" not in text]
    page.fill("#prompt", "x = 1")
    page.click("#run-code")
    answer_is_there(page, "#answer")
    assert not page.locator("#error").is_visible()


def ask_within(page: "Page", ttft: str, prompt: str) -> object:
    """Move the slider for the first token by keyboard, take the other target off, and send; returns what was asked."""
    page.focus("#ttft")
    page.keyboard.press(ttft)
    page.focus("#tpot")
    page.keyboard.press("End")
    assert page.locator("#tpot-out").inner_text() == "no target"
    page.fill("#prompt", prompt)
    with page.expect_request("**/v1/completions") as asked:
        page.click("#run-code")
    body = asked.value.post_data_json
    assert body["prompt"] == prompt
    return body["slo"]


def test_the_slider_is_a_target_and_what_is_late_is_said_to_be_missed(lenient: Server, visit: Visit) -> None:
    """A prompt that takes far longer to read than the smallest step of the slider; without a target nothing is late."""
    page = visit(at=lenient)
    prompt = "".join(f"value_{number} = {number * number}\n" for number in range(150))
    assert ask_within(page, "Home", prompt) == {"ttft_ms": 20}
    assert page.locator("#ttft-out").inner_text() == "20 ms"
    row = page.locator("#past tr[data-request]").first
    row.locator(".verdict.missed").wait_for()
    assert row.locator(".verdict").inner_text() == "missed: less than the work takes"
    assert "of 20 ms" in row.locator("td.late").inner_text()
    assert ask_within(page, "End", "x = 1") == {}
    until(page, "document.querySelector('#past .verdict').textContent === 'no target'")


def test_what_cannot_be_in_time_is_refused_at_once(visit: Visit) -> None:
    """As the text below the sliders says. The browser calls a 429 an error too."""
    page = visit()
    prompt = "".join(f"other_{number} = {number * number}\n" for number in range(150))
    assert ask_within(page, "Home", prompt) == {"ttft_ms": 20}
    until(page, "document.querySelector('#past .verdict')?.textContent === 'refused'")
    assert "asked for within 20 ms" in page.locator("#error").inner_text()
    page.wrong[:] = [text for text in page.wrong if "429" not in text]


def test_a_suspension_can_be_seen(visit: Visit, server: Server) -> None:
    """One long prompt and four short ones in a hurry: its bar is drawn in pieces, it waits in the lane below between
    two of them, and what is said of it is what the server's ledger says."""
    page = visit()
    page.locator("#device").scroll_into_view_if_needed()
    show_a_suspension(page)
    words = page.locator("#shown").inner_text()
    assert "was suspended" in words
    assert "went on where it had stopped" in words
    drawn = page.locator("#device").evaluate("canvas => ({...canvas.dataset})")
    assert int(drawn["suspended"]) >= 1
    assert int(drawn["resumed"]) >= 1
    assert int(drawn["parked"]) >= 1
    assert int(drawn["stretches"]) > int(drawn["suspended"]) + int(drawn["resumed"])
    assert page.locator("#hold").get_attribute("aria-pressed") == "true", "it stands still to be looked at"
    until(page, "document.querySelectorAll('#past tr[data-request]').length >= 5")
    suspended = page.locator("#past tr[data-request]", has_text="no target").locator("td:last-child")
    told = suspended.first.inner_text()
    assert told.endswith("×")
    assert int(told[:-1]) >= 1
    box = page.locator("#device").bounding_box()
    found = set()
    for place in range(1, 60):
        page.mouse.move(box["x"] + box["width"] * place / 60, box["y"] + 40)
        found.add(page.locator("#device-says").inner_text().split(":")[0])
    assert any("yours" in one and one.startswith("Reading") for one in found)
    assert any("yours" in one and one.startswith("Going on with") for one in found)
    page.click("#hold")
    assert page.locator("#hold").get_attribute("aria-pressed") == "false"


def test_what_others_run_is_seen_as_numbers(visit: Visit, server: Server) -> None:
    """A caller beside the page, of another tenant: its steps are drawn, its id is nowhere."""
    page = visit()
    body = {"prompt": "x = " * 100, "max_tokens": 40}
    server.post("/v1/completions", body, x_request_id="somebody-else", x_tenant_id="acme", x_slo_class="chat")
    until(page, "Number(document.getElementById('device').dataset.stretches) >= 10")
    until(page, "document.getElementById('classes').textContent.includes('chat')")
    assert "somebody-else" not in page.content()


def test_a_gap_is_filled(visit: Visit) -> None:
    page = visit()
    page.click("#tab-fill")
    before, after = "def area(width, height):\n    ", "\n    return result\n"
    page.fill("#before", before)
    page.fill("#after", after)
    page.click("#run-fill")
    filling = answer_is_there(page, "#filled")
    assert filling.strip()
    whole = page.locator("#filled").evaluate("box => box.textContent")
    assert whole.startswith(before)
    assert whole.endswith(after)
    assert page.locator("#past .verdict").first.inner_text().startswith(("met", "missed"))


def test_a_chat_is_answered(visit: Visit) -> None:
    page = visit(path="/#chat")
    page.fill("#say", "def greet(name):")
    page.click("#run-chat")
    page.wait_for_selector("#talk .assistant:not(.growing):not(:empty)")
    page.click("#clear")
    assert page.locator("#talk li").count() == 0


def test_everything_by_keyboard(visit: Visit) -> None:
    """From the first tab to the last row, without a pointer."""
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tab-code"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where one is can be seen"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-chat"
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-fill").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-code").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+a")
    page.keyboard.type("import os\n\ndef walk(")
    page.keyboard.press("Control+Enter")
    answer_is_there(page, "#answer")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if reached[-1] == "length":
            before = page.locator("#length-out").inner_text()
            for _ in range(3):
                page.keyboard.press("ArrowRight")
            assert page.locator("#length-out").inner_text() != before
        if reached[-1] == "device":
            page.keyboard.press("+")
            assert page.locator("#width").inner_text() == "4 s"
            page.keyboard.press("ArrowLeft")
            assert page.locator("#hold").get_attribute("aria-pressed") == "true"
            page.keyboard.press("End")
            assert page.locator("#hold").get_attribute("aria-pressed") == "false"
        if reached[-1] == "opener":
            page.keyboard.press("Enter")
            break
    assert [name for name in reached if name in ("ttft", "tpot", "show", "device")] == [
        "ttft",
        "tpot",
        "show",
        "device",
    ]
    page.locator(".life .phases i").first.wait_for()
    page.keyboard.press("Control+Enter")
    page.locator("#answer .new.growing").wait_for(state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#past tr[data-request]:first-child .verdict:text('stopped')")


def test_tab_and_enter_are_enough(visit: Visit) -> None:
    """To send a text, to keep its answer and to go on with that; a text box lets the tabulator go."""
    page = visit()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type(" ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "run-code"
    page.keyboard.press("Enter")
    first = answer_is_there(page, "#answer")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "keep"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.locator("#prompt").input_value().endswith(first)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#past tr[data-request]').length === 2")
    answer_is_there(page, "#answer")


def test_on_a_phone_nothing_is_wider_than_the_screen(visit: Visit) -> None:
    page = visit(width=360, height=740, has_touch=True)
    for name in ("code", "chat", "fill"):
        page.click(f"#tab-{name}")
        assert page.evaluate("document.scrollingElement.scrollWidth") == 360, name
    page.click("#tab-code")
    page.click("#run-code")
    answer_is_there(page, "#answer")
    page.locator("#past .opener").first.click()
    page.locator(".life .phases i").first.wait_for()
    show_a_suspension(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
    small = page.evaluate(
        "() => [...document.querySelectorAll('button')].filter(b => b.checkVisibility() && "
        "b.getBoundingClientRect().height < 24).map(b => b.textContent)"
    )
    assert small == [], "a finger finds every button"


def test_a_phone_in_the_hand(visit: Visit) -> None:
    """390 by 844, as a phone says of itself: nothing to scroll sideways, the playground by finger; a picture."""
    page = visit(width=390, height=844, has_touch=True, is_mobile=True, device_scale_factor=2)
    wide = "[document.scrollingElement.scrollWidth, Math.round(visualViewport.width)]"
    page.tap("#tab-chat")
    page.fill("#say", "def greet(name):")
    page.tap("#run-chat")
    page.wait_for_selector("#talk .assistant:not(.growing):not(:empty)")
    assert page.evaluate(wide) == [390, 390]
    page.tap("#tab-code")
    page.fill("#prompt", "class Stack:\n    def push(self, item):\n")
    page.tap("#run-code")
    assert len(answer_is_there(page, "#answer")) > 10
    page.locator("#heat").tap(position={"x": 300, "y": 8})
    assert page.locator("#heat-out").inner_text() not in ("0.2", "")
    page.tap("#show")
    until(page, "!document.getElementById('show').disabled")
    page.wrong[:] = [text for text in page.wrong if "429" not in text]
    page.locator("#past .opener").first.tap()
    page.locator(".life .phases i").first.wait_for()
    assert page.evaluate(wide) == [390, 390]
    outside = page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea, canvas, pre, figure')].filter(node => "
        "node.checkVisibility() && !node.closest('.scroll') && (node.getBoundingClientRect().right > 390 || "
        "node.getBoundingClientRect().left < 0)).map(node => node.id)"
    )
    assert outside == []
    page.wait_for_timeout(1200)
    picture = ROOT / "docs" / "page-phone.png"
    page.screenshot(path=picture, full_page=True, scale="css")
    assert picture.stat().st_size > 20_000


def test_every_control_has_a_name(visit: Visit) -> None:
    page = visit()
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, input, textarea, canvas[tabindex], [role=region]')]"
        ".filter(node => "
        "!(node.textContent.trim() && node.tagName === 'BUTTON') && !node.labels?.length && "
        "!node.getAttribute('aria-label') && !node.getAttribute('aria-labelledby')).map(node => node.outerHTML)"
    )
    assert nameless == []
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"


def test_who_wants_little_motion_gets_little(visit: Visit) -> None:
    """The timeline moves once a second instead of thirty times."""
    counting = """() => { window.frames_drawn = 0; const clear = CanvasRenderingContext2D.prototype.clearRect;
      CanvasRenderingContext2D.prototype.clearRect = function (...box) {
        if (this.canvas.id === 'device') window.frames_drawn += 1; return clear.apply(this, box); }; }"""
    drawn = {}
    for motion in ("reduce", "no-preference"):
        page = visit(reduced_motion=motion)
        page.click("#run-code")
        answer_is_there(page, "#answer")
        page.evaluate(counting)
        page.wait_for_timeout(2000)
        drawn[motion] = page.evaluate("window.frames_drawn")
    assert drawn["reduce"] <= 4
    assert drawn["no-preference"] > 8


def test_a_page_that_finds_no_place_among_the_readers_still_has_its_figures(visit: Visit, server: Server) -> None:
    """Every place is taken by somebody who only listens. The browser calls the 503 an error; the page does not mind."""
    crowd = []
    try:
        for _ in range(40):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            crowd.append(connection)
        time.sleep(0.5)
        page = visit()
        until(page, "document.getElementById('s-pages').textContent.includes(' of ')")
        page.click("#run-code")
        answer_is_there(page, "#answer")
        assert any("503" in text for text in page.wrong)
        page.wrong[:] = [text for text in page.wrong if "503" not in text]
    finally:
        for connection in crowd:
            connection.close()


def test_the_pictures_in_the_readme(visit: Visit, server: Server) -> None:
    """Taken with some company on the engine, so that the curves have something to say."""
    ends = time.monotonic() + 24

    def company() -> None:
        number = 0
        while time.monotonic() < ends:
            number += 1
            body = {"prompt": f"class Number{number}:\n    def __init__(self", "max_tokens": 12}
            server.post("/v1/completions", body, x_slo_class="chat")
            if number % 5 == 0:
                prompt = [300 + (number * place) % 600 for place in range(900)]
                server.post("/v1/completions", {"prompt": prompt, "max_tokens": 8}, x_slo_class="report")
            time.sleep(0.2)

    caller = threading.Thread(target=company)
    caller.start()
    pages = {name: visit(width=1240, height=900, color_scheme=name) for name in ("light", "dark")}
    for page in pages.values():
        page.bring_to_front()
        page.fill("#prompt", 'def fibonacci(n):\n    """Return the n-th number."""\n')
        page.click("#run-code")
        answer_is_there(page, "#answer")
    caller.join()
    for name, page in pages.items():
        page.bring_to_front()
        show_a_suspension(page)
        assert "was suspended" in page.locator("#shown").inner_text()
        page.mouse.move(5, 5)
        page.wait_for_timeout(1200)
        picture = ROOT / "docs" / ("page.png" if name == "light" else "page-dark.png")
        below = page.evaluate("document.querySelector('.now').getBoundingClientRect().bottom + scrollY")
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1240, "height": below + 14})
        assert picture.stat().st_size > 20_000
