"""Explanations to look at: the page in a real browser, and the summary on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from knnmoe.client import ExampleRef
from playwright.sync_api import Browser, Page
from rich.console import Console

from model_runner.evaluation.explain import NO_CASE, Case, Explanation, LayerPart, WindowPart
from model_runner.evaluation.explain_views import Summary, to_html
from model_runner.text_files import Example
from model_runner.texts import cut_windows
from model_runner.token_texts import TokenTexts
from tests.tiny_checkpoint import byte_tokenizer

TOKENIZER = byte_tokenizer()
EVIL = "</script><img src=x onerror=alert(1)>&{{DATA}}"
TEXT = f"Blessed are é{EVIL}\n\tthe meek"
SNIPPET = f"😀 shall {EVIL} inherit"
Open = Callable[..., Page]


def explanation(text: str = TEXT, length: int = 200, snippet: str = SNIPPET) -> Explanation:
    """Of two layers; token n changed by n thousandths, every second one for the worse."""
    examples = [Example(ExampleRef(f"file {EVIL}", f"row {EVIL}"), text)]
    windows, parts, start = cut_windows(examples, TOKENIZER, length), list[WindowPart](), 0
    for window in windows:
        texts = TokenTexts.of(window.token_ids, TOKENIZER)
        parts.append(WindowPart(window, texts, range(start, start + window.targets)))
        start += window.targets
    n = start
    cases = tuple(
        Case(f"source {EVIL}", "e", position, 7, 0.5, snippet, 2, 7) for position in range(n)
    )
    numbers = np.stack([np.arange(n), np.full(n, NO_CASE)], axis=1).astype(np.int32)
    layer = LayerPart(
        *(0, np.full(n, 0.5, np.float32), ((1, 2),) * n, ((3,),) * n, numbers),
        np.full((n, 2), 0.25, np.float32),
        np.full((n, 2), 0.5, np.float32),
    )
    silent = LayerPart(
        *(1, np.zeros(n, np.float32), ((),) * n, ((),) * n, np.full((n, 2), NO_CASE, np.int32)),
        *(np.zeros((n, 2), np.float32),) * 2,
    )
    plain = np.full(n, 3, np.float32)
    changes = np.arange(n) / 1000 * np.where(np.arange(n) % 2, 1, -1)
    routed = plain + changes.astype(np.float32)
    return Explanation("law", plain, routed, tuple(parts), (layer, silent), cases, 2)


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a page of an explanation; whatever it asks for, logs or throws fails the test."""
    said = list[str]()

    def visit(found: Explanation, width: int = 1280, scheme: str = "light", **options: int) -> Page:
        path = tmp_path / "explained.html"
        path.write_text(to_html(found, **options), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: said.append(request.url))
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda what: said.append(str(what)))
        page.goto(path.as_uri())
        return page

    yield visit
    assert all(url.startswith("file://") and url.endswith("explained.html") for url in said)


def test_a_click_shows_the_words_of_the_neighbours(opened: Open) -> None:
    page = opened(explanation())
    page.locator("[data-n]").nth(5).click()
    panel = page.locator("#panel")
    assert "3.005 with it: +0.005" in panel.inner_text()
    assert "Layer 0" in panel.inner_text()
    assert "experts in: 1, 2; out: 3" in panel.inner_text()
    assert "The memory abstained" in panel.inner_text()
    assert panel.locator(".words").inner_text() == SNIPPET
    assert panel.locator("mark").inner_text() == "shall"
    assert f"source {EVIL} · e · position 5" in panel.inner_text()


def test_texts_are_shown_and_never_read_as_html(opened: Open) -> None:
    page = opened(explanation())
    shown = page.locator(".text").inner_text()
    assert EVIL.replace(" ", "·") in shown  # a blank that is a token can be seen
    assert f"file {EVIL} · row {EVIL}" in page.locator("#text h2").inner_text()
    page.locator("[data-n]").first.click()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_it_is_used_without_a_mouse(opened: Open) -> None:
    page = opened(explanation())
    first = page.locator("[data-n]").first
    first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator('[aria-pressed="true"]').get_attribute("data-n") == "2"
    assert "position 3" in page.locator("#panel h2").inner_text()
    label = page.locator("[data-n]").nth(2).get_attribute("aria-label")
    assert label == '"s", loss 3.00 to 3.00, −0.00'


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_400_pixels(opened: Open, scheme: str) -> None:
    page = opened(explanation(), width=400, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert not page.locator("#panel").is_visible()
    page.locator("#harmed button").first.click()
    assert page.locator("#panel").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (light[0] < light[1]) == (scheme == "light")


def test_a_page_is_bounded_and_says_what_is_left_out(opened: Open) -> None:
    found = explanation("0123456789" * 400, length=100)
    whole, some = to_html(found), to_html(found, most_bytes=100_000)
    assert len(some) < 130_000 < len(whole)
    page = opened(found, most_bytes=100_000)
    left_out = page.locator("#left-out").inner_text()
    windows = page.locator("#text section").count()
    tokens = page.locator("[data-n]").count()
    assert 0 < windows < len(found.windows)
    expected = (
        f"{len(found.plain) - tokens} tokens in the last {len(found.windows) - windows} windows"
    )
    assert left_out.startswith(expected)
    assert page.locator("#helped button").count() == 10
    page.locator("[data-n]").last.click()
    assert f"position {tokens - 1};" in page.locator("#panel").inner_text()


def test_a_memory_without_words(opened: Open) -> None:
    page = opened(explanation(snippet=""))
    page.locator("[data-n]").first.click()
    assert "token 7; its words were not kept" in page.locator("#panel").inner_text()


@pytest.mark.parametrize("width", [60, 120])
def test_the_summary_names_the_tokens_most_changed(width: int) -> None:
    out = io.StringIO()
    found = explanation("Blessed are [bold]the meek")
    Console(file=out, width=width).print(Summary(found, most=2))
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(re.sub(r"[│┃]", " ", text).split())
    assert f"{len(found.plain)} tokens: 3.0000 nats per token" in words
    assert words.index("helped most") < words.index("harmed most")
    [best, second], [worst, *_] = (tokens[:2] for tokens in found.most_changed)
    assert f"{found.changes[best]:+.2f}" in words
    assert abs(found.changes[best]) > abs(found.changes[second])
    assert found.changes[worst] == found.changes.max()
    if width == 120:
        assert "«e»" in text
        assert "[bold]" in text
        assert "«shall»" in text


def test_an_explanation_prints_as_its_summary() -> None:
    found = explanation("Blessed are the meek " * 20)
    assert "helped most" in str(found)
    assert "harmed most" in str(found)
    assert repr(found).startswith(f"<Explanation: {len(found.plain)} tokens: 3.0000 nats")
    assert len(repr(found)) < 200


def test_rounding_is_no_change() -> None:
    found = explanation("Blessed")
    same = replace(found, routed=found.plain + np.float32(1e-6))
    assert "no token changed by 0.005 nats or more; mean lambda per layer: 0.50 0.00" in str(same)
    assert "helped" not in str(same)


def test_a_text_does_not_command_the_terminal() -> None:
    evil = "\x1b]0;title\x07 \u202eback"
    text = str(explanation(f"{evil * 4} and so on", snippet=evil))
    assert not re.search("[\x07\x1b\u202e]", text)
    assert "\\u001b" in text
    assert "\\u202e" in text


def test_a_text_does_not_turn_the_page_around(opened: Open) -> None:
    page = opened(explanation("a \u202eback", snippet="so \u2066on and on"))
    shown = page.locator("main").inner_text()
    assert "\\u202e" in shown
    assert "\u202e" not in shown
