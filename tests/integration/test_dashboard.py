"""`serve --dashboard`: the page in a browser, what it answers to whom, and that it never is in the service's way."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from playwright.sync_api import Browser, Page, expect

from tests.browser import TIMEOUT_MS
from tests.sidecar import (
    CALL_TIMEOUT_S,
    EXPERTS,
    LOGIT_DELTA,
    Sidecar,
    exported,
    random_entries,
    random_keys,
    route_request,
    serve_and_fail,
)

HOSTILE = '<img src=x onerror="document.title=1"> & "quoted" \N{RIGHT-TO-LEFT OVERRIDE}'
FLAGS = ("--dashboard", "127.0.0.1:0")
expect.set_options(timeout=TIMEOUT_MS)


@dataclass(frozen=True)
class Served:
    """A service with a page, and a memory in it that was looked up."""

    sidecar: Sidecar
    url: str
    ids: list[int]  # of layer 0

    def get(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and body."""
        return get(self.url, path, method, **headers)

    def json(self, path: str, **query: Any) -> Any:
        status, _, body = self.get(f"/api/{path}?{urlencode(query)}")
        assert status == 200, body
        return json.loads(body)


def get(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=CALL_TIMEOUT_S)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    reply = connection.getresponse()
    found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def url_of(sidecar: Sidecar) -> str:
    """The second line on stdout."""
    assert sidecar.process.stdout is not None
    line = sidecar.process.stdout.readline().decode()
    assert line.startswith("dashboard on http://127.0.0.1:"), (line, sidecar.stderr)
    return line.removeprefix("dashboard on ").strip()


def look_up(sidecar: Sidecar, name: str, rounds: int = 3) -> None:
    """One token on a stored key, one near it and one far from all, in each layer."""
    [stored] = exported(sidecar, name, 0)
    key = tensors.to_array(stored.keys)[:1]
    rng = np.random.default_rng(5)
    inputs = np.concatenate([key + 100, key + 0.3, key])
    digest = sidecar.describe(name).model_digest
    for _ in range(rounds):
        for layer in range(3):
            own = random_keys(rng, 3, EXPERTS)
            sidecar.route(route_request(name, digest, inputs, own, layer=layer))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("dashboard") / "data"
    with Sidecar(data, backend="exact", flags=FLAGS) as sidecar:
        url = url_of(sidecar)
        sidecar.create("bible", kind=LOGIT_DELTA, gamma=[0.2], neighbours=2)
        for layer, rows in enumerate((60, 30)):
            entries = random_entries(LOGIT_DELTA, rows)
            for origin in entries.provenance[::3]:
                origin.source = HOSTILE
                origin.snippet = "\N{GRINNING FACE} the <b>LORD</b> said"
                origin.token_start, origin.token_end = 9, 13
            sidecar.upsert("bible", layer, entries)
        look_up(sidecar, "bible")
        ids = [n for part in exported(sidecar, "bible", 0) for n in tensors.to_array(part.ids)]
        yield Served(sidecar, url, [int(number) for number in ids])
        sidecar.stop_cleanly()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, in 400 pixels; it must not have failed anywhere, nor asked anybody else."""
    opened = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on("console", lambda said: failures.append(said.text) if said.type == "error" else None)
    opened.on("dialog", lambda dialog: failures.append(dialog.message))
    opened.on(
        "request",
        lambda asked: None if asked.url.startswith(served.url) else failures.append(asked.url),
    )
    opened.goto(served.url)
    expect(opened.locator("#layers tbody tr")).to_have_count(3)
    yield opened
    title, width = opened.title(), opened.evaluate("document.documentElement.scrollWidth")
    opened.close()
    assert failures == []
    assert title == "kNN-MoE routing service"
    assert width == 400


def admin_stats(served: Served) -> Any:
    command = [sys.executable, "-m", "router_service.cli.admin"]
    main = "from router_service.cli.admin import main; main()"
    command = [sys.executable, "-c", main, "--target", served.sidecar.target, "--json", "stats"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def shown(page: Page, name: str) -> str:
    return page.locator(f'#totals dd[data-name="{name}"]').inner_text()


def test_the_numbers_are_those_of_router_admin_stats(page: Page, served: Served) -> None:
    look_up(served.sidecar, "bible", rounds=1)  # while the page is open
    stats = admin_stats(served)
    layers = stats["memories"][0]["layers"]
    tokens = sum(layer["tokens"] for layer in layers)
    tiles = page.locator('#totals dd[data-name="tokens"]')
    expect(tiles).to_have_text(str(tokens))
    names = {"entries": "entries", "lookups": "route_requests", "hits": "hits"}
    names |= {"never hit": "entries_never_hit", "abstained: empty": "abstained_empty"}
    names |= {"abstained: too far": "abstained_too_far"}
    for tile, name in names.items():
        assert int(shown(page, tile).replace(",", "")) == sum(layer[name] for layer in layers)
    abstained = sum(layer["tokens_abstained"] for layer in layers)
    assert shown(page, "answered") == f"{100 * (tokens - abstained) / tokens:.1f} %"
    rows = page.locator("#layers tbody tr").all()
    for row, layer in zip(rows, layers, strict=True):
        cells = [cell.inner_text() for cell in row.locator("th, td").all()]
        found = [int(cell.replace(",", "")) for cell in cells[:7]]
        columns = ("layer", "entries", "route_requests", "tokens", "tokens_abstained")
        assert found == [layer[name] for name in (*columns, "hits", "entries_never_hit")]
        assert cells[7:9] == [f"{layer['mean_lambda']:.3f}", f"{layer['mean_search_ms']:.3f}"]
    page.locator("#lambda summary").click()
    counted = page.locator("#lambda tbody td").all_inner_texts()
    assert [int(cell) for cell in counted] == layers[0]["lambda_counts"]
    stages = page.locator("#stages tbody tr").all_inner_texts()
    total = stats["memories"][0]["stages"][-1]
    assert stages[-1].split()[:2] == ["total", str(sum(total["counts"]))]


def test_a_memory_that_is_gone_is_said(page: Page, served: Served) -> None:
    expect(page.locator("#gone")).to_be_hidden()
    page.goto(f"{served.url}#memory=deleted&layer=1")
    expect(page.locator("#gone")).to_have_text("No memory deleted here: this is bible.")
    page.locator("#memory").select_option("bible")
    page.locator("#layer").select_option("1")
    expect(page.locator("#gone")).to_be_hidden()


def test_charts_out_of_view_are_drawn_when_they_come_into_view(page: Page, served: Served) -> None:
    def drawn() -> int:
        return sum(
            page.evaluate(
                "Chart.getChart(document.querySelector('#lambda canvas')).data.datasets[0].data"
            )
        )

    expect(page.locator("#lambda canvas")).to_have_count(1)
    page.locator("h1").scroll_into_view_if_needed()
    before = drawn()
    look_up(served.sidecar, "bible", rounds=1)
    layer = admin_stats(served)["memories"][0]["layers"][0]
    total = sum(each["tokens"] for each in admin_stats(served)["memories"][0]["layers"])
    expect(page.locator('#totals dd[data-name="tokens"]')).to_have_text(str(total))
    assert drawn() == before
    page.locator("#lambda canvas").scroll_into_view_if_needed()
    page.wait_for_function(
        "n => Chart.getChart(document.querySelector('#lambda canvas')).data.datasets[0].data"
        ".reduce((a, b) => a + b) === n",
        arg=sum(layer["lambda_counts"]),
    )


def press_until(page: Page, target: str, key: str = "Tab", most: int = 60) -> None:
    """With the keyboard alone: until the focus is there, and can be seen."""
    for _ in range(most):
        page.keyboard.press(key)
        at = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        if at == target:
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
            return
    raise AssertionError(f"no {target} within {most} x {key}")


def test_an_entry_is_found_and_explained_without_a_mouse(page: Page, served: Served) -> None:
    press_until(page, "load-map")
    page.keyboard.press("Enter")
    expect(page.locator("#map-note")).to_contain_text("60 entries at version")
    press_until(page, "As a table")
    page.keyboard.press("Enter")
    rows = page.locator("#map tbody tr")
    expect(rows).to_have_count(50)
    assert HOSTILE in rows.locator("td").all_inner_texts()
    assert set(rows.locator("mark").all_inner_texts()) == {"LORD"}
    first = rows.locator("button").first.inner_text()
    press_until(page, first)
    page.keyboard.press("Enter")
    expect(page.locator("#explained tbody tr")).to_have_count(8)
    request = admin_pb.ExplainEntryRequest(memory="bible", id=int(first))
    found = served.sidecar.admin.ExplainEntry(request, timeout=CALL_TIMEOUT_S)
    shown_ids = page.locator("#explained tbody th").all_inner_texts()
    assert shown_ids == [str(case.id) for case in found.token.cases]
    assert page.locator("#explained tr.unread").count() == 8 - 2  # K
    expect(page.locator("#explained")).to_contain_text(f"{getattr(found.token, 'lambda'):.3f}")


def test_sources_are_text(page: Page) -> None:
    page.locator("#load-sources").click()
    expect(page.locator("#sources-note")).to_contain_text("3 sources")
    page.locator("#sources summary").click()
    names = page.locator("#sources tbody th").all_inner_texts()
    assert set(names) == {HOSTILE, "text-0", "text-1"}
    assert page.locator("#sources img").count() == 0


def test_tokens_are_shown_as_they_are_looked_up(page: Page, served: Served) -> None:
    page.locator("#watch").click()
    expect(page.locator("#recent-note")).to_contain_text("None yet")
    look_up(served.sidecar, "bible", rounds=1)
    expect(page.locator("#recent tbody tr")).to_have_count(1)
    nearest = page.locator("#recent tbody button")
    assert nearest.inner_text() == str(served.ids[0])
    nearest.click()
    expect(page.locator("#explained")).to_contain_text(f"Entry {served.ids[0]} of layer 0")


def test_every_chart_has_a_table_and_every_image_a_name(page: Page) -> None:
    page.locator("#load-sources").click()
    page.locator("#load-map").click()
    expect(page.locator("canvas")).to_have_count(6)
    for canvas in page.locator("canvas").all():
        assert canvas.get_attribute("aria-label")
        assert canvas.locator("xpath=ancestor::figure").locator("details").count() == 1


HEADERS = {
    "content-security-policy": "default-src 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/overview", "/nowhere"])
def test_every_answer_keeps_the_page_to_itself(served: Served, path: str) -> None:
    status, headers, _ = served.get(path)
    assert status == (404 if path == "/nowhere" else 200)
    for name, value in HEADERS.items():
        assert headers[name].startswith(value)
    assert "unsafe" not in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("status", "asked"),
    [
        (421, {"Host": "evil.example"}),
        (421, {"Host": "127.0.0.1.evil.example"}),
        (403, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}),
        (200, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
        (200, {"Host": "localhost:1"}),
        (405, {"method": "POST"}),
        (405, {"method": "DELETE"}),
        (405, {"method": "HEAD"}),
    ],
)
def test_who_is_answered(served: Served, status: int, asked: dict[str, str]) -> None:
    assert served.get("/api/overview", **asked)[0] == status


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("map?memory=nobody&layer=0", 404, "memory 'nobody' not found; this service has: bible"),
        ("map?memory=bible", 400, "layer: got '', expected a number"),
        ("map?memory=bible&layer=9", 422, "layer"),
        ("map?memory=bible&layer=4294967296", 400, "layer: got 4294967296"),
        ("explain?memory=bible&layer=0&id=12", 422, "id: got 12"),
        ("explain?memory=bible&layer=0&id=-1", 400, "id: got '-1', expected a number"),
        ("explain?memory=bible&layer=0&id=99999999999999999999", 400, "id: got"),
        ("history", 400, "memory: got nothing"),
        (f"sources?memory={'x' * 300}", 404, "not found"),
    ],
)
def test_what_cannot_be_shown_is_said(served: Served, path: str, status: int, words: str) -> None:
    found, _, body = served.get(f"/api/{path}")
    assert (found, words in json.loads(body)["error"]) == (status, True), body


def test_files_outside_of_the_page_are_not_served(served: Served) -> None:
    for path in ("/static/../view.py", "/static/%2e%2e/view.py", "/static/..%2fview.py"):
        assert served.get(path)[0] == 404


def test_an_empty_layer_has_a_map_without_points(served: Served) -> None:
    assert served.json("map", memory="bible", layer=2)["points"] == []


def test_operations_are_shown(served: Served) -> None:
    served.json("sources", memory="bible")
    shown: list[dict[str, object]] = []
    while "sources" not in {each["kind"] for each in shown}:  # pages share a recent answer
        shown = served.json("overview")["operations"]


@pytest.mark.parametrize("backend", ["exact", "edge"])
def test_the_service_stops_with_open_pages(tmp_path: Path, backend: str) -> None:
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(tmp_path / "data", backend=backend, flags=FLAGS))
        url = url_of(sidecar)
        netloc = urlsplit(url).netloc
        for _ in range(3):
            connection = HTTPConnection(netloc, timeout=CALL_TIMEOUT_S)
            stack.callback(connection.close)
            connection.request("GET", "/api/overview")
            assert connection.getresponse().read()  # and stays open
        sidecar.stop_cleanly()
        with pytest.raises(OSError, match="refused"):
            get(url, "/")


def test_the_page_ends_with_a_service_that_is_killed(tmp_path: Path) -> None:
    with Sidecar(tmp_path / "data", backend="exact", flags=FLAGS) as sidecar:
        url = urlsplit(url_of(sidecar))
        get(url.geturl(), "/")
        sidecar.kill()
        with (
            suppress(ConnectionRefusedError),
            socket.create_connection((url.hostname, url.port), CALL_TIMEOUT_S) as connection,
        ):  # taken by the one that ends, or by none
            connection.settimeout(CALL_TIMEOUT_S)
            with suppress(ConnectionError):
                assert connection.recv(1) == b""


def test_a_page_that_ends_is_said_and_the_service_goes_on(tmp_path: Path) -> None:
    with Sidecar(tmp_path / "data", backend="exact", flags=FLAGS) as sidecar:
        get(url_of(sidecar), "/")
        [child] = (
            Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children")
            .read_text()
            .split()
        )
        os.kill(int(child), 9)
        said = "the dashboard has ended with code -9; the service goes on without"
        while said not in sidecar.stderr:
            assert sidecar.process.poll() is None
        sidecar.create("m", kind=LOGIT_DELTA)
        sidecar.stop_cleanly()


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        ("0.0.0.0:0", 2, "--dashboard: got '0.0.0.0:0', expected a loopback address"),
        ("127.0.0.1", 2, "--dashboard: got '127.0.0.1', expected HOST:PORT"),
        ("127.0.0.1:99999", 2, "expected HOST:PORT"),
        ("unix:/tmp/x", 2, "expected HOST:PORT"),
        ("TAKEN", 1, r"cannot listen on 127.0.0.1:\d+ \(Address already in use\); choose another"),
    ],
)
def test_an_address_that_cannot_be_had(tmp_path: Path, address: str, code: int, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.replace("TAKEN", f"127.0.0.1:{taken.getsockname()[1]}")
        arguments = ("--data", str(tmp_path / "d"), "--backend", "exact", "--listen")
        done = serve_and_fail(*arguments, "127.0.0.1:0", "--dashboard", address)
    assert done.returncode == code
    assert re.search(words, done.stderr)
    assert done.stderr.count("\n") == 1


def test_without_its_libraries_one_line_says_what_to_install(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['uvicorn'] = None; from router_service.cli.serve import main"
    arguments = ["serve", "--data", str(tmp_path / "d"), *FLAGS]
    command = [sys.executable, "-c", f"{blocked}; sys.argv[1:] = {arguments!r}; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "router-service: --dashboard needs uvicorn, which cannot be found: pip install 'knn-moe[dashboard]'\n"
    )
