"""A headless Chromium, where there is one, and pages that must not write an error to its console."""

import os
import shutil
import threading
import time

import pytest

SETUP = "run tools/setup_browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="session")
def chromium():
    """The browser. Skips where it or its driver is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason=f"no playwright: {SETUP}")
    program = os.environ.get("TETRI_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: {SETUP}, or name one in TETRI_CHROMIUM")
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, *sandbox])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """Opens a page: show(url, width=1440, scheme="dark", motion="no-preference"). Its console must stay empty, but for
    what `page.expected` has a part of."""
    contexts, errors, expected = [], [], []

    def opened(url, width=1440, scheme="dark", motion="no-preference", before="", height=900):
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion=motion
        )
        contexts.append(context)
        page = context.new_page()
        page.expected = expected
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if before:
            page.add_init_script(before)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in errors if not any(part in text for part in expected)] == []


class Lateness(threading.Thread):
    """How late a timer of this machine was at most, in seconds: it stands still now and then, and so does all on it."""

    PAUSE_S = 0.01

    def __init__(self):
        super().__init__(daemon=True)
        self.most_s, self.ended = 0.0, threading.Event()

    def run(self):
        while True:
            began = time.monotonic()
            if self.ended.wait(self.PAUSE_S):
                return
            self.most_s = max(self.most_s, time.monotonic() - began - self.PAUSE_S)


@pytest.fixture
def soon():
    """Waits for parts of a page, which must be there within 2 s, and twice the time for which the machine stood still:
    soon(begin, *parts), where begin() is what makes them appear."""
    late = Lateness()
    late.start()

    def waited(begin, *parts):
        late.most_s = 0.0
        began = time.monotonic()
        begin()
        for part in parts:
            part.wait_for(timeout=20_000)
        assert time.monotonic() - began < 2.0 + 2 * late.most_s

    yield waited
    late.ended.set()
    late.join()
