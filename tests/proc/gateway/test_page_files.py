"""The files of the page, as browsers get them."""

import asyncio
import re

import pytest
from asgi import Asking
from starlette.applications import Starlette

from tetri.proc.gateway.page_files import FIRST, FOLDER, routes


def got(path, folder=FOLDER, **headers):
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(Asking(path, method="GET", headers=given).of(Starlette(routes=routes(folder))))


def test_every_file_that_the_page_names_is_there():
    first = got("/")
    assert first.status == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="([\w.]+)"', first.body.decode())
    assert names and [got(f"/{name}").status for name in names] == [200] * len(names)
    assert {route.path for route in routes()} == {"/", *(f"/{p.name}" for p in FOLDER.iterdir() if p.name != FIRST)}


def test_the_page_may_load_its_own_files_only():
    headers = got("/").headers
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert headers["x-content-type-options"] == "nosniff" and "http" not in headers["content-security-policy"]


@pytest.mark.parametrize("known", ["{}", "W/{}", '"x", {}'])
def test_a_browser_that_has_a_file_gets_no_copy(known, tmp_path):
    (tmp_path / FIRST).write_text("one")
    first = got("/", tmp_path)
    tag = known.format(first.headers["etag"])
    again = got("/", tmp_path, if_none_match=tag)
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"
    (tmp_path / FIRST).write_text("two")  # an upgrade
    assert got("/", tmp_path, if_none_match=tag).body == b"two"
