"""The live page in a browser, with a made-up deployment behind it (feed.py)."""

import time
from urllib.parse import urlsplit

import pytest
from feed import PAGE, serving

pytestmark = pytest.mark.browser
PATIENCE_MS = 20_000

AT_REQUEST = "document.activeElement.classList.contains('rid')"
# Of each card, caption and waterfall: texts that are cut off, and pairs of texts that overlap. (Notes may be.)
CLASHES = """() => [...document.querySelectorAll('.card, figcaption, .waterfall')].flatMap((card) => {
  const edge = card.getBoundingClientRect().right + (card.matches('.card') ? -1 : 1);
  const shown = [...card.querySelectorAll('b, span')].filter((it) => !it.children.length && it.textContent.trim()
    && getComputedStyle(it).clipPath === 'none' && it.checkVisibility() && it.dataset.noted !== 'true');
  const boxes = shown.map((it) => [it.textContent, it.getBoundingClientRect()]);
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  const pairs = boxes.flatMap((one, i) => boxes.slice(i + 1).filter((two) => meet(one[1], two[1]))
    .map((two) => [one[0], two[0]]));
  return [...boxes.filter(([, box]) => box.right > edge).map(([text]) => text), ...pairs];
})"""
CUT = """() => [...document.querySelectorAll('.bar')].filter((it) => it.scrollWidth > it.clientWidth + 1)
  .map((it) => it.textContent)"""
PLACES = """() => JSON.stringify([...document.querySelectorAll('.card, .panel, .bank, h3')].map((it) => {
  const { x, y, width, height } = it.getBoundingClientRect();
  return [x, y, width, height];
}))"""
SIDEWAYS = "document.documentElement.scrollWidth > innerWidth"
COUNT_FRAMES = """window.frames_asked = 0;
const ask = requestAnimationFrame.bind(window);
window.requestAnimationFrame = (call) => { window.frames_asked++; return ask(call); };"""
HIDE = """Object.defineProperty(document, 'hidden', { get: () => window.away === true });"""


def until(page, expression):
    """Wait until it holds. (Playwright's own would evaluate text in the page, which its policy forbids.)"""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(30)


def shown(page, number):
    until(page, f"document.querySelectorAll('.card').length === {number}")


def bank(page, role):
    return page.locator(f"#bank-{role} .card .top > b").all_text_contents()


@pytest.fixture(scope="module")
def busy():
    """A deployment of four instances under load, with faults some time ago."""
    with serving(4, rate=4, faults=True, seconds=60) as feed:
        yield feed


@pytest.mark.parametrize(("number", "prefill", "mixed"), [(1, 0, 1), (4, 2, 0), (64, 24, 0)])
def test_it_shows_all_instances_in_their_banks_and_asks_nobody_else(show, number, prefill, mixed):
    with serving(number, rate=number / 2, seconds=10) as feed:
        page = show("about:blank")
        asked = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).netloc))
        page.goto(feed.url)
        shown(page, number)
        assert bank(page, "prefill") == [f"p{i}" for i in range(prefill)]
        assert bank(page, "mixed") == [f"m{i}" for i in range(mixed)]
        assert bank(page, "decode") == [f"d{i}" for i in range(number - prefill - mixed)]
        assert {*asked} == {urlsplit(feed.url).netloc}


def test_what_a_card_says(show):
    with serving(4) as feed:
        page = show(feed.url)
        shown(page, 4)
        told = {"queued": 3, "queued_s": 1.24, "fill": 0.83, "free": 1536, "busy": 0.62, "waiting": 2, "running": 7}
        told |= {"heavy": 4, "batch": 6.5, "ratio": {"prefill": 1.02, "decode": None}, "note": "", "keeps": "decode"}
        instance = feed.world.instance
        feed.world.instance = lambda it, now: instance(it, now) | told
        text = page.locator("#card-p0")
        facts = "queue time 1.24 s", "fill 83%", "KV used 25%", "512 / 2,048 blocks", "busy 62%", "batch 6.50"
        for fact in (*facts, "prefill (decode)", "step ratio 1.02", "3 queued · 4 heavy · 5 light · 2 waiting"):
            text.filter(has_text=fact).wait_for(timeout=PATIENCE_MS)


@pytest.mark.parametrize("width", [360, 1440])
def test_a_role_change_and_a_killed_worker_appear_within_two_seconds(show, soon, width):
    with serving(4) as feed:
        page = show(feed.url, width)
        shown(page, 4)
        event, lost = page.locator("#events li"), page.locator("#card-d0[data-state=lost]")
        turned = page.locator("#bank-decode #card-p1"), event.filter(has_text="p1 role")
        soon(lambda: feed.flip("p1", "decode"), *turned)
        assert bank(page, "prefill") == ["p0"]
        soon(lambda: feed.kill("d0"), lost.filter(has_text="lost"), event.filter(has_text="d0 lost"))
        page.locator("#said").filter(has_text="d0 lost").wait_for(timeout=PATIENCE_MS, state="attached")
        assert page.evaluate(SIDEWAYS) is False


def test_a_waterfall_opens_by_keyboard_alone(show, busy):
    page = show(busy.url)
    page.locator("tr[data-stage=done] .rid").first.wait_for(timeout=PATIENCE_MS)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(AT_REQUEST):
            break
    rid = page.evaluate("document.activeElement.dataset.rid")
    page.keyboard.press("Enter")
    page.locator("#detail .waterfall").wait_for(timeout=PATIENCE_MS)
    assert rid in page.locator("#h-detail").text_content()
    assert "prefill" in page.locator(".waterfall").get_attribute("aria-label")
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    rows = page.locator("#detail tbody tr")
    rows.first.wait_for(timeout=PATIENCE_MS)
    assert {"chunk", "offered", "queued"} <= {*page.locator("#detail tbody td:nth-child(4)").all_text_contents()}
    page.keyboard.press("Escape")
    page.locator("#detail").wait_for(state="hidden", timeout=PATIENCE_MS)
    assert page.evaluate(AT_REQUEST)


@pytest.mark.parametrize("width", [360, 1440])
def test_no_text_of_a_waterfall_overlaps_or_is_cut_off(show, busy, width):
    page = show(busy.url, width)
    page.locator("tr[data-stage=done] .rid").first.click(timeout=PATIENCE_MS)
    for view in ("whole", "first"):
        page.locator(f"#view-{view}").click(timeout=PATIENCE_MS)
        assert page.evaluate(CLASHES) == [] and page.evaluate(CUT) == []


TOP = "(id) => document.getElementById(id).getBoundingClientRect().top"


@pytest.mark.parametrize("number", [4, 64])
def test_on_a_narrow_screen_few_instances_come_before_the_charts(show, number):
    with serving(number) as feed:
        page = show(feed.url, 360)
        shown(page, number)
        assert (page.evaluate(TOP, "instances") < page.evaluate(TOP, "charts")) is (number == 4)
        assert page.evaluate(TOP, "n-moving") == page.evaluate(TOP, "n-bytes")  # on one line


def test_a_lost_instance_is_not_said_to_be_busy(show):
    with serving(4) as feed:
        page = show(feed.url)
        shown(page, 4)
        told, instance = {"busy": 0.99, "state": "lost"}, feed.world.instance
        feed.world.instance = lambda it, now: instance(it, now) | told
        page.locator("#card-d0[data-state=lost]").filter(has_text="busy –").wait_for(timeout=PATIENCE_MS)


def test_a_request_is_found_by_its_identifier_and_a_retry_is_named(show):
    with serving(4, rate=4, seconds=20) as feed:
        with feed.lock:
            killed = next(it.iid for it in feed.world.open.values() if it.at >= 0)
            hit = [it.rid for it in feed.world.open.values() if it.iid == killed]
        feed.kill(killed)
        page = show(feed.url)
        page.locator("#rid").fill(hit[0])
        page.keyboard.press("Enter")
        page.locator(".point[data-tone=bad]").wait_for(timeout=PATIENCE_MS)
        assert "worker_lost" in page.locator(".point[data-tone=bad]").get_attribute("title")
        page.expected.append("404")
        page.keyboard.press("Escape")
        page.locator("#rid").fill("nobody")
        page.keyboard.press("Enter")
        page.get_by_text("No such request is known").wait_for(timeout=PATIENCE_MS)


def test_a_further_choice_is_asked_for_by_its_id(show, busy):
    page = show(busy.url)
    shown(page, 4)
    page.expected.append("404")  # the feed knows first choices only
    with page.expect_request(lambda request: request.url.endswith("live/requests/abc.2"), timeout=PATIENCE_MS):
        page.locator("#rid").fill("abc.2")
        page.keyboard.press("Enter")


@pytest.mark.parametrize("width", [360, 1440])
def test_an_instance_shows_its_load_over_time(show, busy, width):
    page = show(busy.url, width)
    page.locator("#card-d0").focus(timeout=PATIENCE_MS)
    page.keyboard.press("Enter")
    page.locator("#detail figure").nth(3).wait_for(timeout=PATIENCE_MS)
    labels = [canvas.get_attribute("aria-label") for canvas in page.locator("#detail canvas").all()]
    assert [label.partition(":")[0].strip() for label in labels] == [
        *("Requests", "KV used", "Busy and chunk fill", "Batch"),
    ]
    assert page.evaluate(CLASHES) == []
    page.locator("#detail summary").click()
    assert page.locator("#detail tbody tr").count() > 0
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "card-d0"


def test_it_asks_for_the_key_keeps_it_in_the_tab_and_says_when_it_is_wrong(show):
    with serving(4, key="right") as feed:
        page = show(feed.url)
        page.expected.append("401")
        page.locator("#key").fill("€", timeout=PATIENCE_MS)  # no header can hold it
        page.keyboard.press("Enter")
        assert page.locator("#key:invalid").is_visible()
        for key in ("wrong", "right"):
            page.locator("#key").fill(key, timeout=PATIENCE_MS)
            assert page.locator(".card").count() == 0
            page.keyboard.press("Enter")
            if key == "wrong":
                page.get_by_text("not accepted").wait_for(timeout=PATIENCE_MS)
        shown(page, 4)
        assert "Authorization: Bearer $TETRI_API_KEY" in page.locator("#try").text_content()
        page.reload()
        shown(page, 4)
        assert page.evaluate("Object.values(localStorage).length + document.cookie.length") == 0
        assert "right" not in page.url


def test_requests_of_a_broker_that_is_gone_are_forgotten(show):
    with serving(4, rate=5, seconds=5) as feed:
        page = show(feed.url)
        page.locator("#requests [data-stage=decode]").first.wait_for(timeout=PATIENCE_MS)
        with feed.lock:
            feed.world.rate, feed.world.epoch = 0, 2
            feed.world.open.clear()
        page.locator("#requests [data-stage=decode]").first.wait_for(timeout=PATIENCE_MS, state="detached")
        assert page.locator("#requests [data-stage=done]").count() > 0


def test_it_connects_again_by_itself_and_says_so(show):
    with serving(4) as feed:
        page = show(feed.url)
        page.expected += ["ERR_", "Failed to load"]
        shown(page, 4)
        feed.broken = True
        page.locator(".link[data-state=lost]").filter(has_text="trying again").wait_for(timeout=PATIENCE_MS)
        assert page.locator(".card").count() == 4  # what it knew stays
        feed.flip("p1", "decode")
        feed.broken = False
        page.locator(".link[data-state=live]").wait_for(timeout=PATIENCE_MS)
        page.locator("#bank-decode #card-p1").wait_for(timeout=PATIENCE_MS)


def test_without_requests_it_says_what_to_type(show):
    with serving(4) as feed:
        page = show(feed.url)
        page.locator("#empty").wait_for(timeout=PATIENCE_MS)
        typed = page.locator("#try").text_content()
        assert 'tetri-cli submit "' in typed and f"curl {feed.url}v1/completions" in typed
        feed.world.rate = 20
        page.locator("#empty").wait_for(state="hidden", timeout=PATIENCE_MS)
        assert page.locator("#requests tr").count() > 0


def test_notes_are_a_banner_and_what_the_server_says_stays_text(show):
    bad = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    with serving(4, rate=2, seconds=5) as feed:
        feed.world.notes, feed.world.model = [bad], bad
        with feed.lock:
            instance = feed.world.instances[bad] = feed.world.instances.pop("p0")
            instance.note = instance.iid = bad
            feed.world.submit(time.time(), bad)
        feed.world.event(time.time(), "lost", bad, bad)
        page = show(feed.url)
        page.locator("#notes li").filter(has_text=bad).wait_for(timeout=PATIENCE_MS)
        page.locator(".card").filter(has_text=bad).wait_for(timeout=PATIENCE_MS)
        assert page.evaluate(CLASHES) == []  # a name may be as long as this
        page.locator(".rid").filter(has_text=bad).wait_for(timeout=PATIENCE_MS)
        page.locator(".rid").filter(has_text=bad).click()
        page.locator("#detail .waterfall").wait_for(timeout=PATIENCE_MS)
        assert page.locator("#events").text_content().count(bad) == 2
        assert page.evaluate("window.hacked === undefined && !document.querySelector('body script, [onerror]')")
        feed.world.notes = []
        page.locator("#notes").wait_for(state="hidden", timeout=PATIENCE_MS)


@pytest.mark.parametrize("number", [1, 4, 12, 64])
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_overlaps_or_is_cut_off_jumps_or_scrolls_sideways(show, number, width):
    with serving(number, rate=number, seconds=8) as feed:
        page = show(feed.url, width)
        shown(page, number)
        until(page, "document.querySelectorAll('#requests tr').length > 3")
        places = page.evaluate(PLACES)
        for _ in range(2):
            page.wait_for_timeout(300)
            assert page.evaluate(CLASHES) == []
            assert page.evaluate(PLACES) == places
        foreign = "[data-role=decode] .queue-fact:visible, [data-role=prefill] .batch-fact:visible"
        assert page.locator(foreign).count() == 0
        assert page.evaluate(SIDEWAYS) is False


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_no_serious_violation(show, busy, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = show(busy.url, width, scheme, motion="reduce")
    page.locator("tr[data-stage=done] .rid").first.wait_for(timeout=PATIENCE_MS)

    def grave():
        found = axe.run(page).response["violations"]
        return [(it["id"], it["nodes"][0]["html"]) for it in found if it["impact"] in ("serious", "critical")]

    assert grave() == []
    for opener, part in (("tr[data-stage=done] .rid", ".waterfall"), (".card", "figure")):
        page.locator(opener).first.click()
        page.locator(f"#detail {part}").first.wait_for(timeout=PATIENCE_MS)
        page.locator("#detail summary").click()
        assert grave() == []
        page.keyboard.press("Escape")


def test_with_reduced_motion_nothing_is_animated_and_the_facts_are_the_same(show):
    with serving(4, rate=30, seconds=5) as feed:
        page = show(feed.url, motion="reduce", before=COUNT_FRAMES)
        shown(page, 4)
        before, ticks = page.evaluate("window.frames_asked"), feed.number
        page.wait_for_timeout(1000)
        frames, ticks = page.evaluate("window.frames_asked") - before, feed.number - ticks
        assert frames <= ticks + 2  # one picture for each message
        assert page.locator("#requests tr").count() > 3 and page.locator("#n-decode").text_content() != "0"
        assert page.evaluate("document.getAnimations().length") == 0
        moving = show(feed.url, before=COUNT_FRAMES)
        until(moving, f"window.frames_asked > {3 * ticks + 10}")


def test_a_hidden_page_does_nothing_and_has_all_when_it_is_shown_again(show):
    with serving(4) as feed:
        page = show(feed.url, before=HIDE)
        shown(page, 4)
        assert feed.watchers == 1

        def turn(away):
            page.evaluate(f"window.away = {away}; document.dispatchEvent(new Event('visibilitychange'))")
            deadline = time.monotonic() + PATIENCE_MS / 1000
            while feed.watchers != (away == "false"):
                assert time.monotonic() < deadline
                page.wait_for_timeout(50)

        turn("true")
        feed.flip("p1", "decode")
        turn("false")
        page.locator("#bank-decode #card-p1").wait_for(timeout=PATIENCE_MS)
        page.locator("#events li").filter(has_text="p1 role").wait_for(timeout=PATIENCE_MS)


def test_the_files_are_small():
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 60_000
