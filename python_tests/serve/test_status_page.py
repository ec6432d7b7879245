"""The status page in a real browser: what it shows, by keyboard, in light and dark, with a key."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
import serving

KEY = "a-key-of-tests"


@pytest.fixture(scope="module")
def browser():
    """Chromium through Playwright; skips by name where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("EMOE_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium), and EMOE_BROWSER names none")
    with playwright.sync_playwright() as running:
        # Without the sandbox, as tests run as root in containers; the page is ours.
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page whose errors fail the test: scripts that raise, and what the content policy stops."""
    page, errors = browser.new_page(), []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield page
    page.close()
    assert [each for each in errors if not each.startswith("Failed to load resource")] == []


def _until(page, expression):
    """Waits for an expression. Playwright's own way evaluates text in the page, which the page's policy forbids."""
    serving.until(lambda: page.evaluate(expression) or page.wait_for_timeout(20))


def _press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def _background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def _focused(page):
    return page.evaluate("document.activeElement.id")


def test_the_page_shows_the_model_and_which_experts_are_in_memory(server, tiny, page):
    server.chat("hello")
    page.goto(server.url)
    _until(page, "document.getElementById('state').textContent === 'running'")
    assert page.text_content("#model") == "tiny"
    assert page.title() == "tiny – emoe"
    width, height = page.evaluate("[heat[0].length, heat.length]")
    assert (height, width) == (len(tiny[0].emoe.residents()), tiny[0].emoe.residents()[0][0])
    status = server.http.get("/status").json()
    assert page.evaluate("last.layers") == status["layers"]
    assert "hit rate, so far" in page.text_content("#rates")
    shown = page.evaluate("Array.from(document.getElementById('heat').getContext('2d').getImageData(5, 5, 1, 1).data)")
    assert shown[3] == 255, "cells are drawn"


def test_the_page_goes_on_by_itself_and_stops_when_told(server, page):
    page.goto(server.url)
    _until(page, "last !== null")
    before = page.evaluate("last.steps")
    server.chat("more work")
    _until(page, f"last.steps > {before}")
    page.keyboard.press("Tab")
    assert _focused(page) == "pause"
    page.keyboard.press("Enter")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    page.wait_for_timeout(500)  # what was asked for before may still come
    stopped = page.evaluate("last.seconds")
    page.wait_for_timeout(1500)
    assert page.evaluate("last.seconds") == stopped
    page.keyboard.press("Enter")
    _until(page, f"last.seconds > {stopped}")


def test_every_cell_can_be_reached_and_read_with_the_keyboard(server, page):
    page.goto(server.url)
    _until(page, "last !== null")
    _press(page, "Tab", "Tab")
    assert _focused(page) == "heat"
    _press(page, "Home", "ArrowUp", "ArrowUp", "ArrowUp")
    assert page.text_content("#cell").startswith("Layer 0, expert 0: ")
    _press(page, "ArrowDown", "ArrowRight", "ArrowRight")
    assert page.text_content("#cell").startswith("Layer 1, expert 2: ")
    _press(page, "End", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown")
    assert page.text_content("#cell").startswith("Layer 2, expert 7: ")
    said = "not in memory" not in page.text_content("#cell")
    assert said == (7 in page.evaluate("last.layers[2].resident"))


def test_running_requests_and_their_tasks_are_shown_as_text_alone(server, page):
    page.goto(server.url)
    _until(page, "last !== null")
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            server.chat("x", max_tokens=200, extra_body={"ignore_eos": True, "task": "a b/c", "ttft_slo_ms": 5000.0})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        page.wait_for_selector("#requests tr")
        row = page.text_content("#requests tr")
        assert "chatcmpl-" in row and "a b/c" in row and "ttft 5,000 ms" in row
        assert "a b/c" in page.text_content("#tasks")
    finally:
        stop.set()
        asking.join()


def test_light_and_dark_follow_the_system(server, page):
    page.emulate_media(color_scheme="light")
    page.goto(server.url)
    _until(page, "last !== null")
    light = _background(page)
    page.emulate_media(color_scheme="dark")
    _until(page, f"getComputedStyle(document.body).backgroundColor !== '{light}'")
    assert sum(map(int, light[4:-1].split(","))) > 600
    assert sum(map(int, _background(page)[4:-1].split(","))) < 150


def test_a_narrow_window_scrolls_tables_and_not_the_page(server, page):
    page.set_viewport_size({"width": 360, "height": 700})
    page.goto(server.url)
    _until(page, "last !== null")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_with_a_key_the_page_asks_for_it_and_keeps_it_for_the_tab(chat_folder, page):
    with (
        serving.loaded(chat_folder) as (model, tokenizer),
        serving.running(serving.engine_of(model, tokenizer), tokenizer, key=KEY) as server,
    ):
        page.goto(server.url)
        page.wait_for_selector("#key", state="visible")
        assert "API key" in page.text_content("#trouble")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        _until(page, "last !== null")
        assert not page.is_visible("#key") and not page.is_visible("#trouble")
        page.reload()
        _until(page, "last !== null")


def test_a_server_that_is_gone_is_said(chat_folder, page):
    with (
        serving.loaded(chat_folder) as (model, tokenizer),
        serving.running(serving.engine_of(model, tokenizer), tokenizer) as server,
    ):
        page.goto(server.url)
        _until(page, "last !== null")
        page.route("**/status", lambda route: route.abort())
        _until(page, "document.getElementById('state').textContent === 'not connected'")
        page.unroute("**/status")
        _until(page, "document.getElementById('state').textContent === 'running'")
