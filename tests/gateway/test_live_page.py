"""The live view in a real browser: headless Chromium, from Debian's package or from the PATH."""

import contextlib
import io
import os
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from nanoserve_client import Cancelled, Client
from nanoserve_client.v1 import admin_pb2
from PIL import Image
from playwright.sync_api import TimeoutError, sync_playwright
from servers import ADMIN

BIN = Path(sys.executable).parent
# `make .venv/installed-dev` puts the first into .venv/bin.
PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
SECONDS = 60
GREEN, BLUE, GOLD, LIME = (0x52, 0xD6, 0x9A), (0x5B, 0x9B, 0xF5), (0xF2, 0xB8, 0x4B), (0xC6, 0xEA, 0x4A)
SYSTEM = "You answer questions about serving language models. Be brief, be exact, and say so if you do not know. " * 2


@pytest.fixture(scope="module")
def browser():
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    found = next(filter(None, (shutil.which(program, path=path) for program in PROGRAMS)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium-headless-shell, or put a chromium into the PATH")
    with sync_playwright() as playwright:
        # A machine for tests may run them as root, whom the sandbox refuses.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=SECONDS * 1000)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, which must neither complain nor ask another server for anything."""
    opened = []

    def open_(url):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(SECONDS * 1000)
        page.complaints, page.foreign = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.foreign.append(request.url))
        page.goto(f"{url}/")
        page.url_of_server = url
        opened.append(page)
        return page

    yield open_
    for page in opened:
        assert not [url for url in page.foreign if not url.startswith((page.url_of_server, "data:"))]
        page.close()


class Callers:
    """Threads that ask one request after the other, which share the beginning of their prompts."""

    def __init__(self, target, count):
        self._client = Client(target)
        self._streams = [None] * count
        self._is_over = False
        self._threads = [threading.Thread(target=self._ask, args=[i]) for i in range(count)]

    def _ask(self, i):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is the number {i}?"}]
        while not self._is_over:
            self._streams[i] = self._client.chat(
                messages, max_tokens=1500, ignore_eos=True, request_id=f"caller-{i:02}"
            )
            with contextlib.suppress(Cancelled):
                list(self._streams[i])

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over = True
        while any(thread.is_alive() for thread in self._threads):
            for stream in filter(None, self._streams):
                stream.cancel()
            for thread in self._threads:
                thread.join(0.1)
        self._client.close()


def until(page, holds):
    """The page's state changes with what comes; its policy allows no script of ours."""
    for _ in range(SECONDS * 20):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError(page.locator("body").inner_text())


def number(page, id):
    text = page.locator(id).inner_text()
    return int(text) if text.isdigit() else -1


def colours(page, id):
    picture = Image.open(io.BytesIO(page.locator(id).screenshot())).convert("RGB")
    return Counter({colour: count for count, colour in picture.getcolors(picture.width * picture.height)})


def explain_any(page):
    """Click on lanes until one is somebody's: a lane is nobody's for a while after its sequence has ended."""
    for lane in range(60):
        page.locator("#lanes").click(position={"x": 40, "y": 72 + 21 * (lane % 20)})
        with contextlib.suppress(TimeoutError):
            page.locator("#timeline li").first.wait_for(timeout=2000)
            return
    raise AssertionError(page.locator("body").inner_text())


def test_twenty_requests_share_the_batch(served, open_page, tmp_path):
    page = open_page(served.url)
    page.locator("#state.live").wait_for()
    assert page.locator("#model").inner_text() == "nanoserve-builtin"
    with Callers(served.address, 20):
        until(page, lambda: number(page, "#running") == 20)
        # Prompts have a prefix in common, so blue, gold and green are all there, on the lanes and in the map.
        until(page, lambda: all(colours(page, "#lanes")[each] > 50 for each in (GREEN, BLUE, GOLD)))
        until(page, lambda: colours(page, "#blocks")[GOLD] > 20)
        assert page.locator("#idle").is_hidden()
        picture = tmp_path / "live.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 20_000
        explain_any(page)
        with Client(served.address) as client:
            assert client.explain_request(page.locator("#explained").inner_text())
        assert "Prefilled in" in page.locator("#summary").inner_text()
        # A step of a lane has a tip.
        box = page.locator("#lanes").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 30, box["y"] + 72)
        until(page, lambda: "step " in page.locator("#tip").inner_text())
    until(page, lambda: number(page, "#running") == 0)
    assert page.locator("#idle").is_visible()
    assert not page.complaints


def test_guesses_that_were_right_have_a_colour_of_their_own(scripted, open_page):
    """Of the three that a step guesses, two are right, and the second is the last token of all."""
    sequence = admin_pb2.SequenceSnapshot(
        request_number=4,
        request_id="mine",
        phase=admin_pb2.SEQUENCE_PHASE_DECODE,
        prompt_tokens=9,
        completion_tokens=3,
    )
    parts = [
        admin_pb2.StepPart(request_number=4, start=0, tokens=9, prompt_tokens=9, sampled=True),
        admin_pb2.StepPart(request_number=4, start=9, tokens=1, sampled=True, draft_tokens=3, accepted_draft_tokens=2),
    ]
    steps = [admin_pb2.StepSnapshot(number=i, parts=[part]) for i, part in enumerate(parts, 1)]

    def watch(_request, context):
        stats = admin_pb2.GetStatsResponse(running=1, draft_acceptance_ratio=2 / 3)
        yield admin_pb2.WatchEngineResponse(stats=stats, sequences=[sequence], steps=steps)
        while context.is_active():
            threading.Event().wait(0.05)

    scripted.script.watch = watch
    page = open_page(scripted.url)
    until(page, lambda: colours(page, "#lanes")[LIME] > 50)
    assert page.locator("#right").inner_text() == "67 %"

    def tip(from_right):
        box = page.locator("#lanes").bounding_box()
        page.mouse.move(box["x"] + box["width"] - from_right, box["y"] + 72)
        return page.locator("#tip").inner_text()

    lines = next(tip(from_right).splitlines() for from_right in range(1, 20, 4) if "step 2" in tip(from_right))
    assert lines[0] == "mine: 9 prompt tokens, 0 tokens from the cache, 3 generated"
    assert lines[1] == "gave a token, and 2 of 3 guesses were right"
    assert lines[2].startswith("step 2: 3 tokens in")


def test_a_request_that_ended_before_its_steps_are_drawn_has_its_name(served, open_page):
    with Client(served.address) as client:
        for i in range(8):
            client.generate(
                "Once", max_tokens=10, ignore_eos=True, request_id=f"before-{i}", max_draft_tokens=0
            ).result()
    page = open_page(served.url)
    page.locator("#state.live").wait_for()

    def names():
        box, tips = page.locator("#lanes").bounding_box(), []
        for y in range(72, int(box["height"]), 21):
            page.mouse.move(box["x"] + 40, box["y"] + y)
            tips.append(page.locator("#tip").inner_text())
        return {tip.partition(":")[0] for tip in tips if ":" in tip}

    until(page, lambda: "before-7" in names())
    assert all(name.startswith("before-") for name in names())
    assert not page.complaints


def test_a_prompt_joins_the_batch_and_its_answer_comes(served, open_page):
    page = open_page(served.url)
    page.locator("#state.live").wait_for()
    page.locator("#prompt").fill("What is TTFT?")
    page.locator("#max-tokens").fill("60")
    page.get_by_role("button", name="Send", exact=True).click()
    until(page, lambda: "time to first token" in page.locator("#mine").inner_text())
    page.locator("#mine li").click()
    until(page, lambda: "It ended: " in page.locator("#summary").inner_text() or page.locator("#mine li").click())
    assert page.locator("#explained").inner_text() == "you-1"
    page.get_by_role("button", name="close").click()
    assert page.locator("#explanation").is_hidden()
    page.get_by_role("button", name="Send 10").click()
    until(page, lambda: page.locator("#mine li").count() == 11)
    assert not page.complaints


def test_markup_in_answers_and_ids_is_text(served, open_page):
    page = open_page(served.url)
    page.locator("#state.live").wait_for()
    with Client(served.address) as client:
        stream = client.generate("Once", max_tokens=1000, ignore_eos=True, request_id="<b id=injected>x</b>")
        with stream:
            next(stream)
            until(page, lambda: number(page, "#running") == 1)
            page.locator("#lanes").click(position={"x": 40, "y": 72})
            until(page, lambda: page.locator("#explained").inner_text() != "")
    assert page.locator("#injected").count() == 0


def test_a_refused_prompt_says_why(served, open_page):
    page = open_page(served.url)
    page.locator("#state.live").wait_for()
    page.locator("#prompt").fill("word " * 3000)
    page.get_by_role("button", name="Send", exact=True).click()
    until(page, lambda: "context" in page.locator("#mine .failed").inner_text())


def test_with_keys_the_page_asks_for_one_and_shows_nothing_before(open_page, guarded):
    page = open_page(guarded.url)
    page.locator("#key-dialog[open]").wait_for()
    assert number(page, "#running") == -1
    page.locator("#key").fill("wrong")
    page.get_by_role("button", name="Watch").click()
    until(page, lambda: "not known" in page.locator("#key-problem").inner_text())
    page.locator("#key").fill(ADMIN)
    page.get_by_role("button", name="Watch").click()
    page.locator("#state.live").wait_for()
    assert number(page, "#running") == 0
