"""One layer of a replica: its entries in tensors on the model's device, changed in place while lookups go on.

An entry has a row. What is written goes into free rows, which no lookup finds, and is found from `commit` on. Lookups
hold the layer's lock (`with layer.lock:`); a commit waits until none is inside, flips a few norms and lets them in
again. Staging, committing and taking hits are for one thread at a time; lookups come from any.

On CUDA the follower's thread and the model may use other streams: a commit, and taking counts, wait for the device
before and after. The tensors stay where they are until the capacity grows, so a CUDA graph that reads them may be
replayed across commits.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.lookup_lock import LookupLock, drain_of

log = logging.getLogger(__name__)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
INFINITY = float("inf")
_DELETED = -1  # in the place of a row


@dataclass(frozen=True, slots=True)
class Flip:
    """What a commit changes: rows that are found from then on, with their squared norms, and rows that are not.

    Attributes:
        shown, hidden: int64 [n], [m] on the layer's device.
        squared_norms: f32 [n].
        rows: the same two as arrays.

    """

    shown: Tensor
    squared_norms: Tensor
    hidden: Tensor
    rows: tuple[I64, I64]


class FirstPass(Protocol):
    """Chooses candidates, so that a lookup need not look at every row."""

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """See search.nearest; None: every row is to be looked at. Within the layer's lock."""
        ...


class LayerReplica:
    """Entries of one MoE layer; W = num_experts logits or logit deltas, or top_k experts and then top_k weights.

    Attributes:
        keys: [capacity, d] of `dtype`.
        scales: f32 [capacity] with int8 keys (key = scale * numbers), else None.
        squared_norms: f32 [capacity] of the stored keys; +inf: the row is free, or staged. A lookup may compute with
            such a row's key and value, which are finite, and must not return it.
        values: f32 [capacity, W].
        examples: int64 [capacity], the number of the example that an entry came from.
        hits: int32 [capacity], counted by lookups, see `take_hits`.
        counts: f64 [4], counted by lookups, see `take_counts`.
        rows: all rows in use are below it.
        row_versions: int64 NumPy [capacity], the version in which a row was last shown or hidden.
        version: rises with every commit that changed something.
        growths: rises when the tensors were replaced by larger ones: CUDA graphs must be captured again.
        lock: held by lookups, see above.
        first_pass: asked before every row is looked at, if there is one; see first_pass.attach.

    """

    def __init__(
        self,
        dimension: int,
        value_width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lock: LookupLock | None = None,
    ) -> None:
        """An empty layer. Raises BadInput for a dtype that keys cannot have."""
        if dtype not in KEY_DTYPES:
            raise BadInput(f"keys of a replica: got {dtype}, expected one of {KEY_DTYPES}")
        self.dimension, self.value_width, self.dtype = dimension, value_width, dtype
        self.device = torch.device(device)
        self.lock = lock or LookupLock(drain_of(self.device))
        self.first_pass: FirstPass | None = None
        self.rows = self.version = self.growths = 0
        self.row_versions = np.zeros(0, np.int64)
        self._new_tensors(0)
        self._row_ids = np.zeros(0, np.uint64)
        self._digests = np.zeros(0, np.uint64)
        self._row_of: dict[int, int] = {}
        self._staged: dict[int, int] = {}
        self._free: list[int] = []  # the lowest last: rows in use stay close together
        self._hits_of_gone = Counter[int]()
        # Of what lookups count.
        self._counting = threading.Lock()
        self.counts = torch.zeros(4, dtype=torch.float64, device=self.device)
        self._lookups = 0

    def __len__(self) -> int:
        """Entries that lookups find."""
        return len(self._row_of)

    @property
    def capacity(self) -> int:
        """Rows, free ones included."""
        return len(self.keys)

    @staticmethod
    def row_bytes(dimension: int, value_width: int, dtype: torch.dtype) -> int:
        """Bytes of device memory that a row takes."""
        scale = 4 if dtype == torch.int8 else 0
        return dimension * dtype.itemsize + scale + 4 * value_width + 2 * 4 + 8 + 4

    def stored_keys(self, rows: Tensor) -> Tensor:
        """Keys of rows int64 [...], as f32 [..., d]."""
        keys = self.keys[rows].float()
        return keys if self.scales is None else keys * self.scales[rows].unsqueeze(-1)

    @property
    def free_rows(self) -> int:
        """Entries that can be staged before it has to grow."""
        return len(self._free)

    def reserve(self, entries: int, most_rows: int | None = None) -> None:
        """Makes room for so many more entries, so that nothing grows when they come.

        Doubles the capacity at least, yet to `most_rows` only where that is enough; an empty layer gets what was asked
        for. Lookups go on while tensors are copied.
        """
        missing = entries - self.free_rows
        if missing > 0:
            doubled = 2 * self.capacity if most_rows is None else min(2 * self.capacity, most_rows)
            self._grow(max(doubled, self.capacity + missing))

    def stage(
        self,
        ids: U64,
        keys: Tensor,
        scales: Tensor | None,
        values: Tensor,
        examples: I64,
        digests: U64,
    ) -> None:
        """Writes n entries, which lookups find from the next commit on; an id that is there already is replaced then.

        ids [n], each once; keys [n, d] of the layer's dtype; scales f32 [n] with int8 keys, else None; values [n, W];
        examples [n]; digests [n], kept for `held`. Raises BadInput when a shape or dtype is another.
        """
        self._check(ids, keys, scales, values, examples, digests)
        self.reserve(len(ids))
        rows = np.array([self._free.pop() for _ in range(len(ids))], np.int64)
        self._write(self._on_device(rows), keys, scales, values, torch.from_numpy(examples))
        self._row_ids[rows], self._digests[rows] = ids, digests
        self.rows = max(self.rows, int(rows.max(initial=-1)) + 1)
        for entry, row in zip(ids.tolist(), rows.tolist(), strict=True):
            self._drop_staged(entry)
            self._staged[entry] = row

    def stage_deletion(self, ids: U64) -> None:
        """From the next commit on lookups do not find these; ids [n] that are not there count for nothing."""
        for entry in ids.tolist():
            self._drop_staged(entry)
            self._staged[entry] = _DELETED

    def discard(self) -> None:
        """Forgets what was staged."""
        for entry in list(self._staged):
            self._drop_staged(entry)

    def commit(self) -> None:
        """What was staged takes effect, between two lookups."""
        flip = self.prepared()
        if flip is not None:
            with self.lock.committing():
                self.flip(flip)
            self.settle(flip)

    def prepared(self) -> Flip | None:
        """The work of a commit that needs no lock; None when it would change nothing.

        For commits of several layers that share a lock: `prepared` each, then `flip` each within `lock.committing()`,
        then `settle` each.
        """
        shown = [row for row in self._staged.values() if row != _DELETED]
        hidden = [self._row_of[entry] for entry in self._staged if entry in self._row_of]
        if not shown and not hidden:
            self._staged.clear()
            return None
        arrays = np.array(shown, np.int64), np.array(hidden, np.int64)
        on_device = self._on_device(arrays[0])
        return Flip(on_device, self._norms[on_device], self._on_device(arrays[1]), arrays)

    def flip(self, flip: Flip) -> None:
        """Shows and hides rows; while no lookup is inside."""
        self.squared_norms.index_fill_(0, flip.hidden, INFINITY)
        self.squared_norms.index_copy_(0, flip.shown, flip.squared_norms)
        self.version += 1
        for rows in flip.rows:
            self.row_versions[rows] = self.version

    def settle(self, flip: Flip) -> None:
        """Frees the rows that were hidden, and takes their hits."""
        self._keep_hits(flip)
        self._free.extend(sorted(flip.rows[1].tolist(), reverse=True))
        for entry, row in self._staged.items():
            if row == _DELETED:
                self._row_of.pop(entry, None)
            else:
                self._row_of[entry] = row
        self._staged.clear()

    def held(self) -> tuple[U64, U64]:
        """(ids, digests) of the entries that lookups find, ids ascending."""
        ids = np.fromiter(self._row_of, np.uint64, len(self._row_of))
        rows = np.fromiter(self._row_of.values(), np.int64, len(ids))
        order = np.argsort(ids)
        return ids[order], self._digests[rows[order]]

    def examples_in_use(self) -> set[int]:
        """The numbers of the examples that entries came from, but for those that are only staged."""
        rows = np.fromiter(self._row_of.values(), np.int64, len(self._row_of))
        return set(np.unique(self.examples[self._on_device(rows)].cpu().numpy()).tolist())

    def ids_of(self, rows: I64) -> U64:
        """Ids of the entries in rows [...]; of a free row, what was there last."""
        return self._row_ids[rows]

    def count(self, rows: Tensor, hit: Tensor, counts: Tensor) -> None:
        """Counts a lookup: a hit for rows int64 [n] where hit [n] bool; counts as in routing_policy.Retrieved, f64 [4].

        Within the lock.
        """
        with self._counting:  # two threads that add in place would lose some
            self.hits.index_add_(0, rows, hit.to(torch.int32))
            self.counts += counts
            self._lookups += 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within it one lookup adds to `hits` and `counts` what it found. Within the lock."""
        with self._counting:
            yield
            self._lookups += 1

    def count_token(
        self, hits: I64, looked_up: float, abstained: float, not_finite: float, weight: float
    ) -> Tensor:
        """`count` of a lookup of one token on the CPU, which hit rows [n], each once; gives the counts, f64 [4]."""
        counts = np.array((looked_up, abstained, not_finite, weight))
        with self._counting:
            self.hits.numpy()[hits] += 1
            of_all = self.counts.numpy()
            of_all += counts
            self._lookups += 1
        return torch.from_numpy(counts)

    def take_hits(self) -> tuple[U64, U64]:
        """(ids, hits) of the entries that were hit since it was last called; those of entries that are gone too."""
        with self._taking_counts():
            counts = self.hits.clone()
            self.hits.zero_()
        counted = counts.cpu().numpy()
        rows = np.flatnonzero(counted)
        taken, self._hits_of_gone = self._hits_of_gone, Counter()
        for entry, hits in zip(self._row_ids[rows].tolist(), counted[rows].tolist(), strict=True):
            taken[entry] += hits
        return (
            np.fromiter(taken.keys(), np.uint64, len(taken)),
            np.fromiter(taken.values(), np.uint64, len(taken)),
        )

    def take_counts(self) -> tuple[int, int, int, float]:
        """(lookups, tokens, tokens that abstained, their lambdas' sum) since it was last called."""
        with self._taking_counts():
            counts, lookups = self.counts.clone(), self._lookups
            self.counts.zero_()
            self._lookups = 0
        tokens, abstained, _, lambda_sum = counts.tolist()
        return lookups, int(tokens), int(abstained), lambda_sum

    def _keep_hits(self, flip: Flip) -> None:
        """Those of rows that are about to be used for others."""
        if not len(flip.rows[1]):
            return
        with self._taking_counts():
            counts = self.hits[flip.hidden]
            self.hits.index_fill_(0, flip.hidden, 0)
        ids = self._row_ids[flip.rows[1]].tolist()
        for entry, hits in zip(ids, counts.tolist(), strict=True):
            if hits:
                self._hits_of_gone[entry] += hits

    @contextmanager
    def _taking_counts(self) -> Iterator[None]:
        with self._counting:
            self.lock.drain()
            yield
            self.lock.drain()

    def _drop_staged(self, entry: int) -> None:
        row = self._staged.pop(entry, _DELETED)
        if row != _DELETED:
            self._free.append(row)

    def _write(
        self,
        rows: Tensor,
        keys: Tensor,
        scales: Tensor | None,
        values: Tensor,
        examples: Tensor,
    ) -> None:
        self.keys.index_copy_(0, rows, keys.to(self.device))
        if self.scales is not None and scales is not None:
            self.scales.index_copy_(0, rows, scales.to(self.device))
        self.values.index_copy_(0, rows, values.to(self.device, torch.float32))
        self.examples.index_copy_(0, rows, examples.to(self.device))
        self._norms.index_copy_(0, rows, self.stored_keys(rows).square().sum(-1))

    def _on_device(self, rows: I64) -> Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _new_tensors(self, capacity: int) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=dtype, device=self.device)

        self.keys = new(self.dimension, dtype=self.dtype)
        self.scales = new() if self.dtype == torch.int8 else None
        self.squared_norms = new().fill_(INFINITY)
        self.values = new(self.value_width)
        self.examples = new(dtype=torch.int64)
        self.hits = new(dtype=torch.int32)
        self._norms = new()  # of staged rows too

    def _grow(self, capacity: int) -> None:
        before = self.capacity
        grown = LayerReplica(
            self.dimension, self.value_width, dtype=self.dtype, device=self.device, lock=self.lock
        )
        grown._new_tensors(capacity)
        names = ["keys", "values", "examples", "_norms", "squared_norms"]
        names += [] if self.scales is None else ["scales"]
        for name in names:
            getattr(grown, name)[:before].copy_(getattr(self, name))
        with self.lock.committing():
            grown.hits[:before].copy_(self.hits)
            for name in (*names, "hits"):
                setattr(self, name, getattr(grown, name))
            self.growths += 1
        more = capacity - before
        self.row_versions = np.pad(self.row_versions, (0, more))
        self._row_ids = np.pad(self._row_ids, (0, more))
        self._digests = np.pad(self._digests, (0, more))
        self._free = [*range(capacity - 1, before - 1, -1), *self._free]
        if before and self.device.type == "cuda":
            log.warning(
                "a layer of the replica grew from %d to %d rows: CUDA graphs that use it must be captured again "
                "(reserve more rows beforehand)",
                *(before, capacity),
            )

    def _check(
        self,
        ids: U64,
        keys: Tensor,
        scales: Tensor | None,
        values: Tensor,
        examples: I64,
        digests: U64,
    ) -> None:
        entries = len(ids)
        expected = {
            "keys": (tuple(keys.shape), (entries, self.dimension)),
            "values": (tuple(values.shape), (entries, self.value_width)),
            "examples": (examples.shape, (entries,)),
            "digests": (digests.shape, (entries,)),
            "dtype of keys": (keys.dtype, self.dtype),
            "scales": (
                None if scales is None else tuple(scales.shape),
                (entries,) if self.dtype == torch.int8 else None,
            ),
        }
        for name, (got, wanted) in expected.items():
            if got != wanted:
                raise BadInput(f"entries for a replica: {name} {got}, expected {wanted}")
