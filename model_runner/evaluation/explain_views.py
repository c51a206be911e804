"""An explanation to look at: one page for a browser, and a summary for a terminal."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections import defaultdict
from importlib.resources import files
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from model_runner.evaluation.explain import NO_CASE, Case, Explanation, WindowPart
from model_runner.evaluation.per_token import ClassScores, by_class
from model_runner.token_texts import TokenClass

# Of a page; a browser shows twice as much, slowly. Windows that do not fit are left out, and the page says how many.
PAGE_BYTES = 8 * 1024 * 1024
# Tokens that were helped, and harmed, most.
MOST = 10
# Share of the tokens whose change has less than the full colour.
_SCALE_QUANTILE = 0.95
_LEAST_SCALE = 0.1  # nats: less is hardly a change
# Nats; what rounds to nothing in two digits is arithmetic in another order, not a change.
_LEAST_SHOWN = 0.005
# A terminal obeys the first kind, and the second turns the rest of a line around.
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def to_html(found: Explanation, *, most_bytes: int = PAGE_BYTES) -> str:
    """One page that needs nothing else: no network, no file, no script but its own. Every text is escaped.

    Windows are shown in order until the page has `most_bytes`, one at least.
    """
    document = found.to_json()
    shown = _Page(document["cases"])
    for window in document["windows"]:
        if not shown.add(window, most_bytes):
            break
    tokens = sum("change" in token for window in shown.windows for token in window["tokens"])
    helped, harmed = _worth_showing(found)
    data = {name: document[name] for name in ("memory", "tokens", "neighbours_read", "nll")} | {
        "change_sum": document["change_sum"],
        "scale": _scale(found),
        "windows": shown.windows,
        "cases": shown.cases,
        "left_out": {
            "windows": len(found.windows) - len(shown.windows),
            "tokens": len(found.plain) - tokens,
        },
        "helped": [token for token in helped if token < tokens][:MOST],
        "harmed": [token for token in harmed if token < tokens][:MOST],
        "classes": [[name, row.tokens, row.change] for name, row in classes_in(found).items()],
    }
    return _page(f"What the memory {found.memory} did", data)


class _Page:
    """Windows and cases that are shown; cases are numbered anew."""

    def __init__(self, cases: list[dict[str, Any]]) -> None:
        self.windows: list[dict[str, Any]] = []
        self.cases: list[dict[str, Any]] = []
        self._every, self._numbers, self._bytes = cases, dict[int, int](), 0

    def add(self, window: dict[str, Any], most_bytes: int) -> bool:
        """Whether it goes on the page."""
        near = [
            near
            for token in window["tokens"]
            for layer in token.get("layers", ())
            for near in layer["neighbours"]
        ]
        new = [n for n in dict.fromkeys(each["case"] for each in near) if n not in self._numbers]
        cases = [self._every[number] for number in new]
        self._bytes += len(_json([window, cases]))
        if self.windows and self._bytes > most_bytes:
            return False
        for number in new:
            self._numbers[number] = len(self._numbers)
        for each in near:
            each["case"] = self._numbers[each["case"]]
        self.windows.append(window)
        self.cases += cases
        return True


def _page(title: str, data: dict[str, Any]) -> str:
    template = files(__package__).joinpath("explain.html").read_text(encoding="utf-8")
    head, rest = template.split("<style>", 1)
    style, rest = rest.split("</style>", 1)
    script = rest.rsplit("<script>", 1)[1].split("</script>", 1)[0]
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    # The data come last: what stands in a text is never taken for a place to fill.
    page = head + f"<style>{style}</style>" + rest
    for place, filled in (("POLICY", policy), ("TITLE", html.escape(title)), ("DATA", _json(data))):
        before, after = page.split(f"{{{{{place}}}}}", 1)
        page = before + filled + after
    return page


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that may stand within a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})


def _scale(found: Explanation) -> float:
    """The change, in nats, that has the full colour."""
    largest = np.quantile(np.abs(found.changes), _SCALE_QUANTILE)
    return round(max(float(largest), _LEAST_SCALE), 3)


def classes_in(found: Explanation) -> dict[str, ClassScores]:
    """The classes of its tokens."""
    kinds = [
        TokenClass.of(part.texts.token(at))
        for part in found.windows
        for at in part.window.target_at
    ]
    return by_class(kinds, found.plain, found.routed)


class Summary:
    """What `rich` prints: the loss, and the tokens that were helped and harmed most."""

    def __init__(self, found: Explanation, most: int = MOST) -> None:
        self._found, self._most = found, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self._found
        yield Text(found.headline)
        helped, harmed = _worth_showing(found)
        if not helped and not harmed:
            lambdas = [float(layer.lambdas.mean()) for layer in found.layers]
            yield Text(
                f"no token changed by {_LEAST_SHOWN} nats or more; mean lambda per layer: "
                + " ".join(f"{value:.2f}" for value in lambdas)
            )
        for title, tokens in (("helped most", helped), ("harmed most", harmed)):
            if tokens:
                yield self._table(title, tokens[: self._most])

    def _table(self, title: str, tokens: list[int]) -> Table:
        table = Table("change", "loss", "token", "nearest case", title=title, title_justify="left")
        found = self._found
        for token in tokens:
            part, at = found.place(token)
            table.add_row(
                f"{found.changes[token]:+.2f}",
                f"{found.plain[token]:.2f} → {found.routed[token]:.2f}",
                _in_context(part, at),
                _nearest(found, token),
            )
        return table


def as_text(found: Explanation) -> str:
    """The summary without colours."""
    out = io.StringIO()
    Console(file=out, color_system=None).print(Summary(found))
    return out.getvalue().rstrip()


def _worth_showing(found: Explanation) -> tuple[list[int], list[int]]:
    """As `most_changed`, without what is rounding."""
    helped, harmed = (
        [token for token in tokens if abs(found.changes[token]) >= _LEAST_SHOWN]
        for tokens in found.most_changed
    )
    return helped, harmed


def _in_context(part: WindowPart, at: int, before: int = 24) -> Text:
    start, end = part.texts.spans[at]
    text = Text(_one_line(part.texts.text[max(0, start - before) : start]))
    return text.append(_marked(part.texts.text[start:end]), "bold")


def _nearest(found: Explanation, token: int) -> Text:
    """The case with the largest part in the lookups of all layers."""
    weights = defaultdict[int, float](float)
    for layer in found.layers:
        for case, share in zip(layer.neighbours[token], layer.shares[token], strict=True):
            if case != NO_CASE:
                weights[int(case)] += float(layer.lambdas[token] * share)
    if not any(weights.values()):
        return Text("none", "dim")
    return _shown(found.cases[max(weights, key=weights.__getitem__)])


def _shown(case: Case, around: int = 24) -> Text:
    start, end = case.token_start, case.token_end
    words = Text(_one_line(case.snippet[max(0, start - around) : start]))
    words.append(_marked(case.snippet[start:end]), "bold")
    words.append(_one_line(case.snippet[end : end + around]))
    if not case.snippet:
        words = Text(f"token {case.token}", "dim")
    return words.append(f" ({case.source} {case.example}, {case.position})", "dim")


def _marked(token: str) -> str:
    """Marked by signs, not by colours alone: a summary may go into a log."""
    return f"«{_one_line(token)}»"


def _one_line(text: str) -> str:
    text = text.replace("\r", "").replace("\n", "⏎").replace("\t", "→")
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
