"""The demo: a frozen model gets better on text that it was not trained for, through a real sidecar; and its plots.

Reference, settings and test windows are drawn with one seed; every setting was chosen on the dev split.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from knnmoe.client import AdminClient
from matplotlib.figure import Figure

from model_runner.evaluation.nll import bootstrap_interval, difference, oracle_scores
from model_runner.memory_builder.builder import (
    BuildReport,
    MemoryBuilder,
    Target,
    collect_router_inputs,
)
from model_runner.memory_builder.recipes import CONTROLS, PAPER, PRESETS, Direction
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.retrieval import Retrieval, Where, open_retriever
from model_runner.router_client import OnError
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import Scores, score
from model_runner.sidecar import running_sidecar
from model_runner.small_moe import data_file
from model_runner.texts import Window, read_windows
from model_runner.wire import encode_by_layer

# Of results.json.
SCHEMA = 1
# The oracle's best step is larger than a memory's: nothing is averaged or mistaken for a neighbour's.
ORACLE_STEP_SIZE = 30.0
# Controls are read with lambda near 1: blending two routings smooths them, which alone gains up to 0.01 nats.
CONTROL_LAMBDA0 = 0.98
# Scores must not fall back: a busy sidecar gets its time.
LOOKUP_TIMEOUT_S = 60.0
DOMAINS = ("shifted", "in_domain")
EMBEDDED = "edge"
# What the names of the demo's collections on a Qdrant server begin with.
SERVER_PREFIX = "knnmoe-demo"
# Arm of results.json -> preset of its memory.
METHODS = {
    "knn_moe": "paper",
    "knn_moe_paper_v2": "paper-v2",
    "knn_moe_recommended": "recommended",
}
# Arm of results.json -> what readers know it by.
ARM_LABELS = {
    "zero_shot": "plain model",
    "knn_moe": "paper (kNN-MoE)",
    "knn_moe_paper_v2": "paper, second reading",
    "knn_moe_recommended": "recommended",
    "control_eta0": "control: without the step",
    "control_random": "control: random step",
    "control_negated": "control: negated step",
    "control_shuffled": "control: shuffled values",
    "oracle": "oracle: each token's own",
}
# Of the plots, by domain.
_COLOURS = {"shifted": "#2a6f97", "in_domain": "#d98032"}
_LABELS = {"shifted": "shifted text (B)", "in_domain": "general text (A)"}


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Sizes of the demo: windows of `length` tokens."""

    seed: int = 0
    length: int = 128
    reference_windows: int = 240
    dev_windows: int = 48
    shifted_test_windows: int = 128
    general_test_windows: int = 128
    # Memories of the controls but eta0 are smaller: what they do is not subtle.
    control_reference_windows: int = 96
    batch_size: int = 32


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of each split."""

    reference: list[Window]
    dev: list[Window]
    shifted: list[Window]
    in_domain: list[Window]

    def of(self, domain: str) -> list[Window]:
        """Test windows of a domain."""
        return self.shifted if domain == "shifted" else self.in_domain


@dataclass(slots=True)
class Timings:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of the block."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


class Demo:
    """One run; `run` writes results.json and the plots into `out` and returns the results."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: DemoSettings,
        out: Path,
        progress: Progress,
        backend: str = EMBEDDED,
        how: Retrieval | None = None,
    ) -> None:
        """`backend`: that of the sidecar, e.g. the URL of a Qdrant server, where nothing is left at the end.

        `how`: the memories are read.
        """
        self._loaded, self._settings, self._out = loaded, settings, out
        self._progress, self._backend = progress, backend
        self._how = how or Retrieval()
        self._timings = Timings()
        self._arms: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Raises RunnerError when the sidecar fails: the demo never mixes scores."""
        started = time.monotonic()
        texts = draw_texts(self._loaded.tokenizer, self._settings)
        data = self._out / "sidecar"
        if data.exists():
            shutil.rmtree(data)
        self._out.mkdir(parents=True, exist_ok=True)
        flags = ["--backend", self._backend, "--qdrant-prefix", SERVER_PREFIX]
        flags += ["--qdrant-timeout-s", str(LOOKUP_TIMEOUT_S)]
        # What is indexed is indexed by this program, which times it.
        flags += ["--optimize-above-mib", "0"]
        with (
            running_sidecar(data, self._out / "sidecar.log", flags=flags) as target,
            self._nothing_left(target),
        ):
            report = self._build(target, texts)
            self._evaluate(target, texts)
        self._timings.seconds["total"] = time.monotonic() - started
        results = self._results(report)
        (self._out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plot_deltas(self._arms, self._out / "delta_nll.png")
        plot_lambdas(self._arms, self._out / "lambda.png")
        return results

    @contextmanager
    def _nothing_left(self, target: str) -> Iterator[None]:
        """Removes the memories, also those of a demo that was killed; those in a directory of its own stay."""
        if "://" not in self._backend:
            yield
            return
        with AdminClient(target) as client:
            self._remove_memories(client)
            yield
            self._remove_memories(client)

    def _remove_memories(self, client: AdminClient) -> None:
        for name in (*METHODS, *CONTROLS):
            if client.find(name) is not None:
                client.delete(name)

    def _build(self, target: str, texts: Texts) -> BuildReport:
        full = [Target(arm, PRESETS[name].recipe) for arm, name in METHODS.items()]
        controls = [
            Target(arm, replace(recipe, seed=self._settings.seed), measure_gain=False)
            for arm, recipe in CONTROLS.items()
        ]
        unstepped = [t for t in controls if t.recipe.direction is Direction.NONE]
        few = texts.reference[: self._settings.control_reference_windows]
        with AdminClient(target) as client:
            for item in (*full, *controls):
                preset = PRESETS[METHODS.get(item.memory, "paper")]
                settings = preset.settings(self._loaded.fingerprint.num_layers)
                client.find_or_create(item.memory, self._loaded.fingerprint.message(), settings)
            builder = MemoryBuilder(
                self._loaded.model,
                self._loaded.fingerprint,
                client,
                batch_size=self._settings.batch_size,
                tokenizer=self._loaded.tokenizer,
            )
            with self._timings.step("build"):
                report = builder.build(texts.reference, full + unstepped, self._progress)
            with self._timings.step("build controls"):
                stepped = [t for t in controls if t not in unstepped]
                builder.build(few, stepped, self._progress)
            if self._how.where is Where.REMOTE:  # a replica needs no index of the sidecar's
                with self._timings.step("index"):
                    self._index(client, [*METHODS, *CONTROLS])
            with self._timings.step("calibrate"):
                self._calibrate(client, texts)
        return report

    def _index(self, client: AdminClient, memories: Sequence[str]) -> None:
        """Two memories at a time: the index of a layer is built by one core."""
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(client.optimize, memory, "int8") for memory in memories]
            for job in self._progress.track(jobs, "indexing", unit="memories"):
                job.result()

    def _calibrate(self, client: AdminClient, texts: Texts) -> None:
        """Gamma of each memory from the distances of dev inputs to its keys."""
        inputs = encode_by_layer(collect_router_inputs(self._loaded.model, texts.dev, most=1000))
        for arm, name in METHODS.items():
            client.calibrate(arm, PRESETS[name].lambda0, inputs)
        for arm in CONTROLS:
            client.calibrate(arm, CONTROL_LAMBDA0, inputs)

    def _evaluate(self, target: str, texts: Texts) -> None:
        plain = {}
        for domain in DOMAINS:
            plain[domain] = self._score(None, texts, domain, "zero_shot")
            self._add("zero_shot", domain, plain[domain], plain[domain], None)
        for arm in METHODS:
            for domain in DOMAINS:
                self._evaluate_memory(target, texts, arm, domain, plain[domain])
        for arm in CONTROLS:
            self._evaluate_memory(target, texts, arm, "shifted", plain["shifted"])
        with self._timings.step("oracle"):
            recipe = replace(PAPER, step_size=ORACLE_STEP_SIZE)
            oracle = oracle_scores(
                self._loaded.model,
                texts.shifted,
                recipe,
                self._progress,
                batch_size=self._settings.batch_size,
            )
        lambdas = [1.0] * self._loaded.fingerprint.num_layers
        self._add("oracle", "shifted", oracle, plain["shifted"], lambdas)

    def _evaluate_memory(
        self, target: str, texts: Texts, arm: str, domain: str, plain: Scores
    ) -> None:
        where = (target, arm, self._loaded.fingerprint, self._loaded.device, self._how)
        with open_retriever(
            *where, Progress(quiet=True), timeout_s=LOOKUP_TIMEOUT_S, on_error=OnError.RAISE
        ) as opened:
            policy = RetrievalPolicy(opened.retriever)
            scores = self._score(policy, texts, domain, arm)
        lambdas = [policy.use[layer].lambda_mean for layer in sorted(policy.use)]
        self._add(arm, domain, scores, plain, lambdas)

    def _score(self, policy: RetrievalPolicy | None, texts: Texts, domain: str, arm: str) -> Scores:
        with self._timings.step(arm):
            return score(
                self._loaded.model,
                texts.of(domain),
                policy,
                self._progress,
                what=f"{arm} on {domain}",
                batch_size=self._settings.batch_size,
            )

    def _add(
        self, name: str, domain: str, scores: Scores, plain: Scores, lambdas: list[float] | None
    ) -> None:
        change = difference(scores, plain)
        low, high = bootstrap_interval(scores, plain, seed=self._settings.seed)
        self._arms.append(
            {
                "name": name,
                "domain": domain,
                "nll": scores.nll,
                "perplexity": scores.perplexity,
                "delta": change.delta,
                "se": change.se,
                "bootstrap_95": [low, high],
                "windows": change.windows,
                "lambda_mean": lambdas or [0.0] * self._loaded.fingerprint.num_layers,
            }
        )

    def _results(self, report: BuildReport) -> dict[str, Any]:
        model = Path(self._loaded.name)
        return {
            "schema": SCHEMA,
            "model": {
                "name": model.name if model.exists() else self._loaded.name,
                **asdict(self._loaded.fingerprint),
                "digest": self._loaded.fingerprint.digest(),
            },
            "reference": {
                "source": data_file("shifted", "reference").name,
                "windows": report.windows,
                "entries_per_layer": report.entries_per_layer,
            },
            "settings": asdict(self._settings),
            "backend": self._backend,
            "retrieval": str(self._how.where),
            "arms": self._arms,
            "timings": {name: round(s, 2) for name, s in self._timings.seconds.items()},
        }


def draw_texts(tokenizer: Any, settings: DemoSettings) -> Texts:
    """Windows of the shipped splits, drawn without replacement by the seed."""

    def draw(domain: Any, split: Any, count: int) -> list[Window]:
        windows = read_windows(data_file(domain, split), tokenizer, settings.length)
        full = [w for w in windows if len(w.token_ids) == settings.length]
        return random.Random(f"{settings.seed}/{domain}/{split}").sample(
            full, min(count, len(full))
        )

    return Texts(
        draw("shifted", "reference", settings.reference_windows),
        draw("shifted", "dev", settings.dev_windows),
        draw("shifted", "test", settings.shifted_test_windows),
        draw("general", "test", settings.general_test_windows),
    )


def table_rows(results: dict[str, Any]) -> Sequence[tuple[str, ...]]:
    """Arm, domain, NLL, perplexity, change, mean lambda: one row per arm, as text."""
    return [
        (
            ARM_LABELS[arm["name"]],
            _LABELS[arm["domain"]],
            f"{arm['nll']:.4f}",
            f"{arm['perplexity']:.2f}",
            "" if arm["name"] == "zero_shot" else f"{arm['delta']:+.4f} ± {arm['se']:.4f}",
            " ".join(f"{value:.2f}" for value in arm["lambda_mean"]),
        )
        for arm in results["arms"]
    ]


def plot_deltas(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of `delta` with 95 % intervals, all on one scale; zero_shot, the baseline, is the zero line.

    The PNG's Description is the digest of what it shows.
    """
    shown = [arm for arm in arms if arm["name"] != "zero_shot"]
    names = list(dict.fromkeys(arm["name"] for arm in shown))
    figure = Figure(figsize=(8.5, 1.2 + 0.45 * len(names)), layout="constrained")
    panel = figure.subplots()
    for domain, label in _LABELS.items():
        rows = [arm for arm in shown if arm["domain"] == domain]
        both = {arm["name"] for arm in shown if arm["domain"] != domain}
        at = [_height(names, arm["name"], domain, shared=arm["name"] in both) for arm in rows]
        _bars(panel, rows, at, f"{label}, {rows[0]['windows']} windows", _COLOURS[domain])
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(names)), [ARM_LABELS[name] for name in names])
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.margins(x=0.15)
    panel.set_xlabel("change in NLL, nats per token (left is better)")
    panel.legend(loc="lower right", fontsize=9)
    _save(figure, path, {"Description": deltas_digest(arms)})


def deltas_digest(arms: Sequence[dict[str, Any]]) -> str:
    """Of what plot_deltas() draws: which results a picture shows."""
    drawn = [[arm["name"], arm["domain"], arm["delta"], arm["se"]] for arm in arms]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


_BAR = 0.36


def _height(names: Sequence[str], name: str, domain: str, *, shared: bool) -> float:
    """Where a bar is: in the middle of its arm, or beside that of the other text."""
    beside = (_BAR / 2) * (-1 if domain == "shifted" else 1)
    return names.index(name) + (beside if shared else 0)


def _bars(
    panel: Any, rows: Sequence[dict[str, Any]], at: Sequence[float], label: str, colour: str
) -> None:
    deltas, halves = [r["delta"] for r in rows], [1.96 * r["se"] for r in rows]
    panel.barh(at, deltas, xerr=halves, color=colour, capsize=2, height=_BAR, label=label)
    for height, delta, half in zip(at, deltas, halves, strict=True):
        sign, where = (1, "left") if delta >= 0 else (-1, "right")
        end = delta + sign * half
        panel.annotate(
            f"{delta:+.3f}",
            (end, height),
            xytext=(4 * sign, 0),
            textcoords="offset points",
            ha=where,
            va="center",
            fontsize=8,
        )


def plot_lambdas(arms: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean lambda per layer on both texts, a panel per memory: high where a close case exists."""
    names = [n for n in METHODS if any(a["name"] == n for a in arms)]
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for arm in (a for a in arms if a["name"] == name):
            values = arm["lambda_mean"]
            panel.plot(
                range(len(values)),
                values,
                marker="o",
                color=_COLOURS[arm["domain"]],
                label=_LABELS[arm["domain"]],
            )
        panel.set_title(ARM_LABELS[name], fontsize=10)
        panel.set_xlabel("MoE layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean lambda")
    panels[-1].legend(fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path, metadata: dict[str, str] | None = None) -> None:
    with mpl.rc_context({"svg.hashsalt": "knn-moe"}):
        figure.savefig(path, dpi=140, metadata=metadata)
