"""The live page of a real deployment with emulated engines."""

import json
from urllib.request import urlopen

import pytest
from feed import World
from live import LiveCluster

pytestmark = pytest.mark.browser
PATIENCE_MS = 20_000


def fields(value):
    """The names of all fields, also inside: of a list, those of its first element."""
    if isinstance(value, dict):
        return {name: fields(part) for name, part in value.items()}
    return [fields(part) for part in value[:1]] if isinstance(value, list) else None


def first_message(url):
    with urlopen(f"{url}/live", timeout=20) as stream:
        return json.loads(next(line for line in stream if line.startswith(b"data:"))[5:])


def test_requests_a_role_change_and_a_killed_worker_of_a_real_deployment(show, soon):
    with LiveCluster(overrides=["cluster.patience_s=1"]) as cluster:
        url = cluster.start_gateway().removesuffix("/v1")
        client = cluster.client()
        client.generate(range(3, 1500), max_tokens=40)
        page = show(url)
        page.locator("#card-d1").wait_for(timeout=PATIENCE_MS)
        assert page.locator(".card").count() == 4
        page.locator("tr[data-stage=done] .rid").first.click(timeout=PATIENCE_MS)
        page.locator("#detail .waterfall").wait_for(timeout=PATIENCE_MS)
        lanes = {name.split()[-1] for name in page.locator(".lane .name").all_text_contents() if name}
        assert {"stages", "chunks", "out", "in", "steps", "events"} <= lanes
        page.keyboard.press("Escape")

        event, operator = page.locator("#events li"), cluster.operator()
        turned = page.locator("#bank-decode #card-p1"), event.filter(has_text="p1 role")
        soon(lambda: operator.flip("p1", "decode"), *turned)
        soon(lambda: operator.flip("p1", "auto"), page.locator("#bank-mixed #card-p1[data-role=auto]"))
        soon(lambda: cluster.kill("d0"), page.locator("#card-d0[data-state=lost]"), event.filter(has_text="d0 lost"))
        page.close()

        made_up = World(4, rate=4)
        for second in range(1, 40):
            made = made_up.message(second)
        made_up.flip(40, "p0", "decode")
        told, made = first_message(url), made_up.first(made_up.message(40))
        for name in ("notes", "moves", "requests"):
            assert type(told.pop(name)) is type(made.pop(name))
        for message in (told, made):
            message["point"] = dict.fromkeys(message.pop("history")[-1])
        assert fields(told) == fields(made)
