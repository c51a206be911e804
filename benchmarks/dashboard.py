"""What a client that routes without pause notices of who looks: `python -m benchmarks.dashboard --json FILE`.

Two services with the same layer of keys, which is indexed and int8: one with --dashboard and --metrics, one without. A
client sends them one token after the other over a stream, in turns: to the one without (without), to the other while a
process reads its metrics once a second, fifteen times as often as Prometheus does (scraped), while one asks it for what
a page that watches the layer asks for, as a browser on another machine does (asked), and while headless Chromium shows
the page on this machine, whose cores it shares (open).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.request import urlopen

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.clustered import make_workload
from benchmarks.sidecars import MEMORY, SidecarClient, build_layers
from benchmarks.stall import NUM_EXPERTS, QUERIES, Router, Seen
from model_runner.progress import Progress
from model_runner.sidecar import running_sidecar

# As the page does: static/app.js.
_POLLS = {
    "api/overview": 5.0,
    f"api/history?memory={MEMORY}": 5.0,
    f"api/recent?memory={MEMORY}&layer=0": 2.0,
}
_SCRAPES = {"metrics": 1.0}
# Starting a browser is not what is measured.
SETTLED_S = 2.0
_LOADED = "#layers tbody tr"
_TIMEOUT_MS = 60_000.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@contextmanager
def asked(url: str, polls: dict[str, float]) -> Iterator[None]:
    """A process of its own asks for paths, each once in so many seconds."""
    asking = multiprocessing.get_context("spawn").Process(
        target=ask, args=[url, polls], daemon=True
    )
    asking.start()
    time.sleep(SETTLED_S)
    yield
    asking.kill()
    asking.join()


def ask(url: str, polls: dict[str, float]) -> None:
    """Without end."""
    next_at = dict.fromkeys(polls, 0.0)
    while True:
        for path, every_s in polls.items():
            if time.monotonic() >= next_at[path]:
                next_at[path] = time.monotonic() + every_s
                with urlopen(f"{url}{path}") as reply:  # noqa: S310  # of the service under test
                    reply.read()
        time.sleep(0.1)


@contextmanager
def shown(url: str) -> Iterator[None]:
    """Chromium shows the page, which watches the layer."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        page.locator(_LOADED).first.wait_for(timeout=_TIMEOUT_MS)
        page.locator("#watch").click()
        time.sleep(SETTLED_S)
        yield
        browser.close()


def run(
    keys: int, dimension: int, rounds: int, phase_s: float, progress: Progress
) -> dict[str, Any]:
    """The phases in turn, `rounds` times."""
    workload = make_workload(keys, dimension, QUERIES, QUERIES, NUM_EXPERTS, 0)
    load = report.load_average()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dashboard-")))
        page, metrics = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        url, metrics_url = f"http://{page}/", f"http://{metrics}/"
        flags = {"without": [], "with": ["--dashboard", page, "--metrics", metrics]}
        clients = {}
        for name, options in flags.items():
            target = f"unix:{directory}/{name}.sock"
            log = directory / f"{name}.log"
            stack.enter_context(running_sidecar(directory / name, log, target, options))
            build_layers(target, workload, 1, [0], progress)
            clients[name] = SidecarClient(target)
            stack.callback(clients[name].close)
        phases: dict[str, tuple[SidecarClient, Callable[[], AbstractContextManager[None]]]] = {
            "without": (clients["without"], nullcontext),
            "scraped": (clients["with"], lambda: asked(metrics_url, _SCRAPES)),
            "asked": (clients["with"], lambda: asked(url, _POLLS)),
            "open": (clients["with"], lambda: shown(url)),
        }
        seen = {name: Seen() for name in phases}
        for number in range(rounds):
            progress.say(f"round {number + 1} of {rounds} ...")
            for name, (client, looks) in phases.items():
                with looks():
                    one = _looked_up(Router(client, workload), phase_s)
                seen[name].elapsed_ms += one.elapsed_ms
                seen[name].errors += one.errors
    rows = {name: each.row(seen["without"]) for name, each in seen.items()}
    ratios = {n: round(row["p99_ms"] / rows["without"]["p99_ms"], 3) for n, row in rows.items()}
    machine = report.machine() | {"load_average": [load, report.load_average()]}
    settings = {"keys": keys, "dimension": dimension, "rounds": rounds, "phase_s": phase_s}
    return {"machine": machine, "settings": settings, **rows, "p99_over_without": ratios}


def _looked_up(router: Router, seconds: float) -> Seen:
    router.start()
    time.sleep(seconds)
    router.stop()
    return router.seen


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def table(result: dict[str, Any]) -> Table:
    """A row per phase."""
    made = Table(title="Route of one token, the service being ... (ms)", box=box.SIMPLE)
    columns = ("p50_ms", "p99_ms", "max_ms", "lookups", "errors", "over_client_deadline")
    for column in ("phase", *columns, "p99 / without"):
        made.add_column(column, justify="left" if column == "phase" else "right")
    for name, ratio in result["p99_over_without"].items():
        made.add_row(name, *(str(result[name][column]) for column in columns), str(ratio))
    return made


@app.command()
def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    keys: Annotated[int, typer.Option(min=1000, help="Keys of the layer.")] = 10_000,
    dimension: Annotated[int, typer.Option(min=8, help="Of the keys.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each phase is run.")] = 2,
    phase_s: Annotated[float, typer.Option(min=0.1, help="Seconds of a phase.")] = 10.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
) -> None:
    """Measure what a client that routes without pause notices of the dashboard and of metrics."""
    result = run(keys, dimension, rounds, phase_s, Progress(quiet=quiet))
    if not quiet:
        console = Console()
        console.width = max(console.width, report.TABLE_WIDTH)
        console.print(table(result))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app()
