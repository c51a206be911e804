"""What a reference is made of: other domains, its composition at a given size, and a stream that drifts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model_runner.evaluation.nll import difference
from model_runner.experiments.arms import (
    extended,
    fitted_memory,
    preset_setting,
    with_null_entries,
)
from model_runner.experiments.local import (
    LocalMemory,
    Setting,
    Traces,
    collect,
    distances_to,
    gammas_at,
    values_of,
)
from model_runner.experiments.registry import Experiment
from model_runner.experiments.results import Row, change
from model_runner.experiments.study import GENERAL, Study, domains, draw
from model_runner.experiments.sweeps import BOTH, changes
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.texts import Window


def transfer_rows(study: Study, _part: str) -> Iterator[Row]:
    """The domain's memory on the test text of every domain."""
    memories = {name: fitted_memory(study, preset_setting(name)) for name in BOTH}
    drawn = partial(draw, study.loaded, split="test", data=study.data, length=study.sizes.length)
    for domain in (*domains(study.data), GENERAL):
        windows = drawn(domain, seed=study.seed, count=study.sizes.test)
        for method, memory in memories.items():
            scores = study.score(windows, memory, f"{method} on {domain}")
            changed = change(scores, study.plain(windows), study.seed)
            yield {
                "method": method,
                "memory": study.texts.domain,
                "text": domain,
                "domain": changed,
            }


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows to choose from, with what choices go by.

    Attributes:
        loss: [W] the plain model's nats per token.
        inputs: [W, d] mean router input of the middle layer, of unit length about the pool's mean.

    """

    windows: Sequence[Window]
    loss: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, traces: Traces) -> Pool:
        """Of a reference's traces."""
        count = len(traces.windows)
        tokens = torch.bincount(traces.window_of, minlength=count).clamp_min(1)

        def means(rows: Tensor) -> Tensor:
            sums = torch.zeros(count, *rows.shape[1:]).index_add(0, traces.window_of, rows)
            return sums / tokens.view(-1, *[1] * (rows.dim() - 1))

        inputs = means(traces.keys[len(traces.keys) // 2].cpu())
        centred = inputs - inputs.mean(0)
        return cls(traces.windows, means(traces.nll), torch.nn.functional.normalize(centred, dim=1))


def at_random(pool: Pool, count: int, seed: int) -> list[int]:
    """The control."""
    order = torch.randperm(len(pool.windows), generator=torch.Generator().manual_seed(seed))
    return order[:count].tolist()


def easiest(pool: Pool, count: int, _seed: int) -> list[int]:
    """By the plain model's loss."""
    return pool.loss.argsort()[:count].tolist()


def hardest(pool: Pool, count: int, _seed: int) -> list[int]:
    """By the plain model's loss."""
    return pool.loss.argsort(descending=True)[:count].tolist()


def by_difficulty(pool: Pool, count: int, _seed: int) -> list[int]:
    """Evenly over the ranks of the loss."""
    order = pool.loss.argsort()
    return order[torch.linspace(0, len(order) - 1, count).long()].tolist()


def spread_out(pool: Pool, count: int, seed: int) -> list[int]:
    """Farthest first: each as unlike those before it as can be."""
    chosen = at_random(pool, 1, seed)
    nearest = pool.inputs @ pool.inputs[chosen[0]]
    while len(chosen) < count:
        masked = nearest.index_fill(0, torch.tensor(chosen), torch.inf)
        chosen.append(int(masked.argmin()))
        nearest = torch.maximum(nearest, pool.inputs @ pool.inputs[chosen[-1]])
    return chosen


def alike(pool: Pool, count: int, seed: int) -> list[int]:
    """Those most like one of them."""
    [first] = at_random(pool, 1, seed)
    return (pool.inputs @ pool.inputs[first]).argsort(descending=True)[:count].tolist()


def by_topic(pool: Pool, count: int, seed: int, topics: int = 8, rounds: int = 10) -> list[int]:
    """As many of each cluster of mean router inputs as can be."""
    centres = pool.inputs[spread_out(pool, min(topics, count), seed)]
    for _ in range(rounds):
        topic = (pool.inputs @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add(0, topic, pool.inputs)
        centres = torch.nn.functional.normalize(sums, dim=1)
    order = at_random(pool, len(pool.windows), seed)
    turns = {n: int((topic[order[:at]] == topic[n]).sum()) for at, n in enumerate(order)}
    return sorted(order, key=lambda n: turns[n])[:count]


def few_documents(pool: Pool, count: int, _seed: int) -> list[int]:
    """All windows of the longest documents."""
    refs = [w.ref for w in pool.windows]
    size = {ref: refs.count(ref) for ref in refs}
    order = sorted(range(len(refs)), key=lambda n: (-size[refs[n]], refs[n].example))
    return order[:count]


CHOICES = {
    "random": at_random,
    "easiest": easiest,
    "hardest": hardest,
    "even by difficulty": by_difficulty,
    "even by topic": by_topic,
    "spread out": spread_out,
    "alike": alike,
    "few documents": few_documents,
}


def composition_rows(study: Study, _part: str) -> Iterator[Row]:
    """A quarter and a half of the reference, chosen in eight ways; random three times."""
    traces, setting = study.traces(), preset_setting("recommended")
    pool = Pool.of(traces)
    for count in (len(pool.windows) // 4, len(pool.windows) // 2):
        for name, choose in CHOICES.items():
            for draws in range(3 if name == "random" else 1):
                rows = traces.rows_of(choose(pool, count, study.seed * 10 + draws))
                memory = subset_memory(study, traces, rows, setting)
                names = {"composition": name, "draw": draws, "reference": count}
                yield {**names, **changes(study, memory, "test", f"{name} {count}")}


def subset_memory(study: Study, traces: Traces, rows: Tensor, setting: Setting) -> LocalMemory:
    """Of these rows of a reference, calibrated anew."""
    keys = [k[rows] for k in traces.keys]
    values = [v[rows] for v in values_of(traces, setting.recipe, traces.norms(rows))]
    return LocalMemory(keys, values, gammas_at(study.medians_to(keys), setting.lambda0), setting)


@dataclass(slots=True)
class Stream:
    """A memory beside a stream of text, which may learn what was scored and forget what is too much.

    Attributes:
        refreshed: it learns.
        most: entries per layer that it holds; None: no bound.
        by: what goes first: `age` or `strength` (the least length of the delta).

    """

    study: Study
    memory: LocalMemory
    refreshed: bool
    most: int | None = None
    by: str = "age"

    def learn(self, windows: Sequence[Window]) -> None:
        """Adds the entries of windows, calibrates by their distances to what was there before, and forgets."""
        if not self.refreshed:
            return
        setting, loaded = self.memory.setting, self.study.loaded
        inputs = collect_router_inputs(loaded.model, windows, most=500)
        medians = distances_to(inputs, self.memory.keys)
        traces = collect(loaded, windows, self.study.progress)
        values = values_of(traces, setting.recipe, self.study.traces().norms())
        keys = [torch.cat(both) for both in zip(self.memory.keys, traces.keys, strict=True)]
        values = [torch.cat(both) for both in zip(self.memory.values, values, strict=True)]
        kept = [self._kept(v) for v in values]
        self.memory = LocalMemory(
            [k[rows] for k, rows in zip(keys, kept, strict=True)],
            [v[rows] for v, rows in zip(values, kept, strict=True)],
            gammas_at(medians, setting.lambda0),
            setting,
        )

    def _kept(self, values: Tensor) -> Tensor:
        count = len(values)
        if self.most is None or count <= self.most:
            return torch.arange(count)
        if self.by == "age":
            return torch.arange(count - self.most, count)
        return values.norm(dim=1).argsort(descending=True, stable=True)[: self.most].sort().values


def drift_rows(study: Study, _part: str) -> Iterator[Row]:
    """A stream that goes from domain to domain: each block is scored before anything learns it."""
    start = fitted_memory(study, preset_setting("recommended"))
    most = len(start.keys[0])
    streams = {
        "frozen": Stream(study, start, refreshed=False),
        "refreshed": Stream(study, start, refreshed=True),
        "refreshed, oldest pruned": Stream(study, start, refreshed=True, most=most),
        "refreshed, weakest pruned": Stream(study, start, True, most, "strength"),
    }
    for phase, domain, windows in phases(study):
        for block in (windows[::2], windows[1::2]):
            plain = study.plain(block)
            for name, stream in streams.items():
                changed = difference(study.score(block, stream.memory, name), plain)
                row: Row = {"stream": name, "phase": phase, "text": domain}
                entries = len(stream.memory.keys[0])
                yield {**row, "entries": entries, "delta": changed.delta, "se": changed.se}
                stream.learn(block)


# Entries of general text in the memory, as shares of the reference's, and steps with as many.
_SHARES = (0.25, 0.5, 1.0)
_ETAS = (2.25, 3.0, 3.5, 4.0)


def null_rows(study: Study, _part: str) -> Iterator[Row]:
    """General text in the memory: entries that change nothing, drawn or chosen, and some that learn as others do.

    Chosen: those where the memory without them would change the routing most. Steps of other lengths have these.
    """
    setting = preset_setting("recommended")  # of a memory without them
    memory = fitted_memory(study, setting)
    for name, mixed in _with_general_text(study, memory):
        for split in ("dev", "test"):
            yield {"eta": setting.step_size, **name, **changes(study, mixed, split, str(name))}
    for eta in _ETAS:
        if eta != setting.step_size:
            chosen = with_null_entries(study, fitted_memory(study, replace(setting, step_size=eta)))
            name = {"eta": eta, "share": 1.0, "values": "chosen", "entries": len(memory.keys[0])}
            for split in ("dev", "test"):
                yield {**name, **changes(study, chosen, split, f"eta {eta:g}")}


def _with_general_text(study: Study, memory: LocalMemory) -> Iterator[tuple[Row, LocalMemory]]:
    windows = study.texts.general_reference[: len(study.texts.reference)]
    general = collect(study.loaded, windows, study.progress)
    learned = values_of(general, memory.setting.recipe, study.traces().norms())
    yield {"share": 0.0, "values": "none", "entries": 0}, memory
    for share in _SHARES:
        rows = int((general.window_of < share * len(general.windows)).sum())
        keys = [keys[:rows] for keys in general.keys]
        names: Row = {"share": share, "entries": rows}
        nothing = [torch.zeros_like(values[:rows]) for values in learned]
        yield {**names, "values": "drawn"}, extended(study, memory, keys, nothing)
        yield (
            {**names, "values": "learned"},
            extended(study, memory, keys, [values[:rows] for values in learned]),
        )
        yield {**names, "values": "chosen"}, with_null_entries(study, memory, share)


def phases(study: Study) -> Iterator[tuple[int, str, list[Window]]]:
    """The study's domain, up to three others, and its own again, in windows of the test split."""
    others = [name for name in domains(study.data) if name != study.texts.domain][:3]
    own = study.texts.test
    count = len(own) // 2
    yield 0, study.texts.domain, own[:count]
    for phase, domain in enumerate(others or [GENERAL], 1):
        drawn = partial(draw, data=study.data, length=study.sizes.length)
        yield phase, domain, drawn(study.loaded, domain, "test", seed=study.seed, count=count)
    yield len(others or [GENERAL]) + 1, study.texts.domain, own[count:]


EXPERIMENTS = (
    Experiment(
        "transfer",
        "What does a memory of one domain do to the text of every other?",
        transfer_rows,
    ),
    Experiment(
        "composition",
        "Does it matter which windows a reference of a given size is made of?",
        composition_rows,
    ),
    Experiment(
        "null-entries",
        "How much general text has a memory to hold to keep silent near such text, and what does that cost?",
        null_rows,
    ),
    Experiment(
        "drift",
        "How does a memory age when the text drifts, with and without refreshing and pruning?",
        drift_rows,
    ),
)
