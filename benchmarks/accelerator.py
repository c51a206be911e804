"""A replica on an accelerator, in at most ten minutes: `python -m benchmarks.accelerator`.

First the replica's answers are compared with NumPy in float64 on the device. Then OLMoE-1B-7B's shape (16 layers,
random weights, bf16) decodes and prefills: the plain model and a replica of 20,000 and of 200,000 keys a layer, each
eagerly, compiled and (decoding) as a CUDA graph, and a sidecar at the last two layers. What did not run is named with
its reason. Without a GPU: `--tiny`.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.table import Table
from torch import Tensor, nn
from transformers import StaticCache

from benchmarks import report
from benchmarks.exact import nearest
from benchmarks.olmoe import (
    NULL_WEIGHT,
    STEP_SIZE,
    Entries,
    Remote,
    Shape,
    fill,
    make_entries,
    make_model,
    zipf_tokens,
)
from benchmarks.replicas import KINDS, Layers, settings_of
from model_runner.architectures.families import Assignment
from model_runner.errors import RunnerError
from model_runner.models import pick_device
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks
from model_runner.routing_policy import FellBack, RetrievalPolicy
from model_runner.sidecar import running_sidecar
from router_service import blending, kernels
from router_service.arrays import Assignment as NumpyAssignment

LAYERS, REMOTE_LAYERS = 16, 2
WARM_STEPS = 3
PLAIN, REMOTE = "plain", "remote"
EAGER, COMPILED, GRAPH = "eager", "torch.compile", "CUDA graph"
# Sums of 2,048 products in f32, and the same of keys rounded to 8 bits of mantissa.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
EXIT_WRONG = 1
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done: sizes of the checks, then those of the measurements."""

    checked_tokens: tuple[int, ...] = (1, 8, 512)
    checked_neighbours: tuple[int, ...] = (1, 3, 32)
    keys: tuple[int, ...] = (20_000, 200_000)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 512
    steps: int = 30
    prefill_modes: tuple[str, ...] = (EAGER, COMPILED)


TINY = Plan((16,), (1, 32), (300,), (1,), 16, 2, (EAGER,))


@dataclass(slots=True)
class Steps:
    """What ran, and what did not and why; nothing begins after the time is up."""

    budget_s: float
    started_s: float = field(default_factory=time.monotonic)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        """Seconds until nothing more begins."""
        return self.budget_s - (time.monotonic() - self.started_s)

    def skip(self, name: str, why: str) -> None:
        """Notes, and prints, what is not done."""
        self.skipped[name] = why
        print(f"skipped {name}: {why}", flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What fails in the block is skipped with its error: a graph that cannot be captured ends no run."""
        print(f"{name} ... ({self.left_s:.0f} s left)", flush=True)
        try:
            yield
        except (RuntimeError, RunnerError) as error:
            self.skip(name, f"{type(error).__name__}: {error}"[:500])

    def has(self, seconds: float, name: str) -> bool:
        """Whether that much time is left; notes the step otherwise."""
        if self.left_s < seconds:
            self.skip(name, f"{self.left_s:.0f} s left, it may take {seconds:.0f} s")
        return self.left_s >= seconds


# The replica next to NumPy.


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: memory, K, tokens, dtype of the keys."""

    values: str  # deltas, logits, top-k, union
    neighbours: int
    tokens: int
    dtype: torch.dtype


def checks(plan: Plan) -> list[Check]:
    """Every kind, K and number of tokens."""
    return [
        Check(values, k, count, dtype)
        for values in ("deltas", "logits", "top-k", "union")
        for k in plan.checked_neighbours
        for count in plan.checked_tokens
        for dtype in TOLERANCES
    ]


def error_of(check: Check, device: torch.device, shape: Shape) -> float:
    """The largest difference of lambdas and of blended routing (per expert) from NumPy, in float64 where it matters."""
    rng = np.random.default_rng(shape.seed)
    rows, dimension, experts, top_k = shape.keys, shape.hidden, shape.experts, shape.top_k
    stored = torch.from_numpy(rng.standard_normal((rows, dimension), np.float32)).to(check.dtype)
    near = stored.float().numpy()[rng.integers(rows, size=check.tokens)]
    queries = near + 0.3 * rng.standard_normal(near.shape).astype(np.float32)
    found, squared = nearest(stored.float().numpy(), queries.astype(np.float64), check.neighbours)
    gamma = kernels.calibrated_gamma(float(np.median(squared[:, 0])), 0.5)
    similar = kernels.rbf_similarity(squared.astype(np.float32), gamma)
    logits = rng.standard_normal((check.tokens, experts), np.float32)
    own = _random_assignments(rng, check.tokens, experts, top_k)
    deltas, stored_assignments = (
        rng.standard_normal((rows, experts), np.float32),
        _random_assignments(rng, rows, experts, top_k),
    )
    values: Tensor | Assignment = torch.from_numpy(deltas)
    if check.values == "deltas":
        lambdas = kernels.shrunk_lambda(similar, NULL_WEIGHT)
        every = np.ones(check.tokens, bool)
        expected = blending.blend_logits(
            logits, deltas[found], similar, NULL_WEIGHT, STEP_SIZE, every
        )
    elif check.values == "logits":
        lambdas = kernels.mean_lambda(similar)
        expected = blending.blend_stored_logits(logits, deltas[found], similar, lambdas)
    else:
        lambdas = kernels.mean_lambda(similar)
        neighbours = NumpyAssignment(
            stored_assignments.experts[found], stored_assignments.weights[found]
        )
        support = blending.Support.UNION if check.values == "union" else blending.Support.TOP_K
        blended = blending.blend_assignments(own, neighbours, similar, lambdas, experts, support)
        expected = blending.scatter_dense(blended.experts, blended.weights, experts)
        values = _torch(stored_assignments)
    settings = settings_of(
        check.neighbours,
        [gamma],
        values=check.values if check.values in KINDS else "assignments",
        union=check.values == "union",
    )
    layers = Layers.of([stored], [values], experts, dtype=check.dtype, device=device)
    answer = layers.read_by(settings).lookup(
        0,
        torch.from_numpy(queries).to(device),
        torch.from_numpy(logits).to(device),
        _torch(own, device),
    )
    assert not isinstance(answer, FellBack)
    assert answer.blended is not None
    if isinstance(answer.blended, Logits):
        got = answer.blended.router_logits.float().cpu().numpy()
    else:
        named = answer.blended.experts.int().cpu().numpy()
        got = blending.scatter_dense(named, answer.blended.weights.float().cpu().numpy(), experts)
    of_lambda = float(np.abs(answer.lambdas.cpu().numpy() - lambdas).max())
    return max(of_lambda, float(np.abs(got - expected).max()))


def _random_assignments(
    rng: np.random.Generator, rows: int, experts: int, top_k: int
) -> NumpyAssignment:
    drawn = rng.random((rows, experts), np.float32)
    chosen = np.argsort(drawn, axis=1)[:, :top_k].astype(np.int32)
    weights = np.take_along_axis(drawn, chosen, axis=1) / np.float32(top_k)
    return NumpyAssignment(chosen, weights)


def _torch(assignment: NumpyAssignment, device: torch.device | str = "cpu") -> Assignment:
    return Assignment(
        torch.from_numpy(assignment.weights).to(device),
        torch.from_numpy(assignment.experts).long().to(device),
    )


# The model with and without it.


class Decoding:
    """One token after a prompt, with a cache of fixed size, so that it can be compiled and captured."""

    def __init__(self, model: nn.Module, shape: Shape, batch: int, plan: Plan) -> None:
        device = next(model.parameters()).device
        prompt = plan.prompt
        length = prompt + WARM_STEPS + plan.steps + 8
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        tokens = zipf_tokens(shape, batch, prompt, 1).to(device)
        with torch.no_grad():
            model.model(input_ids=tokens, past_key_values=self.cache)  # type: ignore[operator]
        self.token = zipf_tokens(shape, batch, 1, 2).to(device)
        self.mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.mask[..., prompt + 1 :] = False

    def step(self) -> None:
        """Without a head: what that costs does not grow with the layers."""
        self.model.model(  # type: ignore[operator]
            input_ids=self.token, attention_mask=self.mask, past_key_values=self.cache
        )

    def rewind(self) -> None:
        """Back to the prompt's end."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.prompt)


class Prefill:
    """A prompt, without a cache."""

    def __init__(self, model: nn.Module, shape: Shape, batch: int, prompt: int) -> None:
        self.model = model
        self.tokens = zipf_tokens(shape, batch, prompt, 1).to(next(model.parameters()).device)

    def step(self) -> None:
        """The whole prompt."""
        self.model.model(input_ids=self.tokens, use_cache=False)  # type: ignore[operator]

    def rewind(self) -> None:
        """Nothing to do."""


Work = Decoding | Prefill


def times_ms(work: Work, policy: Policy | None, mode: str, steps: int) -> list[float]:
    """Of each step, waiting for the device; the hooks are there before anything is compiled or captured."""
    hooks: AbstractContextManager[Any] = (
        nullcontext() if policy is None else RouterHooks(work.model, policy)
    )
    with hooks, torch.no_grad():
        run = _prepared(work, mode)
        work.rewind()
        elapsed = []
        for _ in range(steps):
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            elapsed.append(1000 * (time.perf_counter() - started))
        work.rewind()
    return elapsed


def _prepared(work: Work, mode: str) -> Callable[[], object]:
    run: Callable[[], object] = work.step
    if mode == COMPILED:
        torch._dynamo.reset()
        backend = "inductor" if torch.cuda.is_available() else "eager"
        run = torch.compile(work.step, backend=backend, dynamic=False)
    for _ in range(WARM_STEPS):
        run()
    work.rewind()
    if mode != GRAPH:
        return run
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.step()
    return graph.replay


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(slots=True)
class Run:
    """One model, what is measured with it, and what came out."""

    model: nn.Module
    shape: Shape
    plan: Plan
    steps: Steps
    rows: list[Row] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def works(self) -> Iterator[tuple[str, Work, Sequence[str]]]:
        """Name, work and modes. As generate() does, experts run by `batched_mm` while decoding on a GPU."""
        decoding = "batched_mm" if self.device.type == "cuda" else "grouped_mm"
        for batch in self.plan.batches:
            self.model.config._experts_implementation = decoding  # type: ignore[union-attr]
            work = Decoding(self.model, self.shape, batch, self.plan)
            yield f"decode x{batch}", work, (EAGER, COMPILED, GRAPH)
        self.model.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
        yield (
            "prefill x1",
            Prefill(self.model, self.shape, 1, self.plan.prompt),
            self.plan.prefill_modes,
        )

    def measure(self, arms: dict[str, Policy | None], modes: Sequence[str] | None = None) -> None:
        """Every arm in every mode of every work; the plain model first and, eagerly, last again."""
        for name, work, possible in self.works():
            for mode in possible if modes is None else modes:
                if mode == GRAPH and self.device.type != "cuda":
                    self.steps.skip(f"{name}, {mode}", f"no CUDA: the model is on {self.device}")
                    continue
                for arm, policy in arms.items():
                    self._timed(f"{name}, {mode}, {arm}", (name, mode, arm), work, policy)

    def _timed(
        self, label: str, cell: tuple[str, str, str], work: Work, policy: Policy | None
    ) -> None:
        if not self.steps.has(60 if cell[1] == COMPILED else 10, label):
            return
        with self.steps.step(label):
            ms = np.array(times_ms(work, policy, cell[1], self.plan.steps))
            self.rows.append(
                {
                    **dict(zip(("pass", "mode", "arm"), cell, strict=True)),
                    "p50_ms": round(float(np.median(ms)), 4),
                    "p99_ms": round(float(np.quantile(ms, 0.99)), 4),
                    "min_ms": round(float(ms.min()), 4),
                    "n": len(ms),
                }
            )


def compare(steps: Steps, device: torch.device, shape: Shape, plan: Plan) -> list[Row]:
    """A row per check, with whether it is within its tolerance."""
    rows = []
    for check in checks(plan):
        name = f"{check.values}, K = {check.neighbours}, {check.tokens} tokens, {check.dtype}"
        if not steps.has(5, name):
            continue
        with steps.step(name):
            error = error_of(check, device, shape)
            right = error <= TOLERANCES[check.dtype]
            rows.append({"check": name, "error": float(f"{error:.2e}"), "right": right})
            if not right:
                print(f"WRONG: {name}: off by {error:.1e}", flush=True)
    return rows


def replica_policy(entries: Entries, shape: Shape, device: torch.device) -> RetrievalPolicy:
    """A logit-space memory with K = 1, keys in bf16 as the model's own."""
    layers = Layers.of(
        entries.keys, entries.deltas, shape.experts, dtype=torch.bfloat16, device=device
    )
    settings = settings_of(1, entries.gammas)
    return RetrievalPolicy(layers.read_by(settings))


def measure_remote(run: Run, entries: Entries, layers: range) -> None:
    """A sidecar that is asked at some layers only: to fill all of them would take longer than the run."""
    with tempfile.TemporaryDirectory(prefix="accelerator-") as made:
        socket = f"unix:{made}/route.sock"
        with running_sidecar(Path(made) / "data", Path(made) / "log", socket) as target:
            fill(target, run.model, entries, layers)
            remote = Remote.of(target, run.model)

            def ask(call: RouterCall) -> Assignment | Logits | None:
                return remote.policy(call) if call.site.layer in layers else None

            run.measure({f"{REMOTE}, {len(layers)} layers": ask}, [EAGER])
            remote.close()


def measure(run: Run) -> None:
    """Plain, then a replica of each size, then the sidecar, then plain again."""
    run.measure({PLAIN: None})
    for count in run.plan.keys:
        if not run.steps.has(60, f"replica of {count} keys"):
            continue
        with run.steps.step(f"replica of {count} keys"):
            shape = Shape(**asdict(run.shape) | {"keys": count})
            entries = make_entries(run.model, shape, None)
            run.measure({f"replica, {count} keys": replica_policy(entries, shape, run.device)})
            if count == run.plan.keys[0] and run.steps.has(90, REMOTE):
                with run.steps.step(REMOTE):
                    last = range(run.shape.layers - REMOTE_LAYERS, run.shape.layers)
                    measure_remote(run, entries, last)
        del entries
        gc.collect()
    run.measure({f"{PLAIN} again": None}, [EAGER])


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows, with their time over the plain model's of the same pass and mode."""
    plain = {(row["pass"], row["mode"]): row["p50_ms"] for row in rows if row["arm"] == PLAIN}
    beside = [plain.get((row["pass"], row["mode"])) for row in rows]
    return [
        row | {"ratio": None if p50 is None else round(row["p50_ms"] / p50, 4)}
        for row, p50 in zip(rows, beside, strict=True)
    ]


def table(rows: Sequence[Row]) -> Table:
    """A row per pass, mode and arm."""
    made = Table(title="The model's own step, and with a memory", box=box.SIMPLE)
    words, numbers = ("pass", "mode", "arm"), ("p50_ms", "p99_ms", "ratio", "n")
    for column in words:
        made.add_column(column, no_wrap=True)
    for column in numbers:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(str(row[column]) for column in (*words, *numbers)))
    return made


def main(
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Where the results are written; results/accelerator-DATE.json."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="What to run on: auto, cuda, cpu, ...")] = "auto",
    budget_s: Annotated[float, typer.Option(min=1, help="Nothing begins after so long.")] = 540,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A toy model; the way to try it without a GPU.")
    ] = False,
    seed: report.Seed = 0,
) -> None:
    """Check a replica on an accelerator and measure what it adds. Exit code 1: an answer was wrong."""
    where, steps = pick_device(device), Steps(budget_s)
    if where.type == "cpu" and not tiny:
        raise typer.BadParameter("no accelerator here, and the model is large: use --tiny")
    load = report.load_average()
    shape = Shape.tiny(REMOTE_LAYERS, seed=seed) if tiny else Shape(LAYERS, seed=seed)
    plan = TINY if tiny else Plan()
    checked = compare(steps, where, shape, plan)
    run = Run(make_model(shape, str(where)), shape, plan, steps)
    measure(run)
    rows = with_ratios(run.rows)
    ratios = {
        f"{row['pass']}, {row['mode']}: {row['arm']}": row["ratio"]
        for row in rows
        if row["ratio"] is not None and row["arm"] != PLAIN
    }
    settings = asdict(shape) | {"device": _name(where), "tiny": tiny, "torch": torch.__version__}
    made = report.document("accelerator", settings, rows, ratios, load)
    made |= {"checks": checked, "skipped": steps.skipped}
    today = datetime.now(UTC).date()
    file = json_file or Path(__file__).with_name("results") / f"accelerator-{today}.json"
    report.publish(made, report.Files(file, None, quiet=False), table, None)
    wrong = [each["check"] for each in checked if not each["right"]]
    print(f"{len(checked)} answers compared with NumPy, {len(wrong)} wrong; written to {file}")
    if wrong or not checked:
        raise typer.Exit(EXIT_WRONG)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    typer.run(main)
