"""One round of a fault: services with a load beside what is done to them, and what was found then."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from knnmoe.client import service_error

from tests.faults.cluster_load import PASSES, Caller, Load
from tests.faults.crash import Lost, Wrong
from tests.faults.replica_oracle import Violation as ReplicaViolation
from tests.sidecar import Sidecar, serve_and_fail

# What ends later than so long after the fault, or after its deadline, hangs; on a busy machine a call waits some times
# more for a processor, at each of its steps.
HANG_S, _STEPS = 5.0, 10
_BEAT_S = 0.02
KEPT = 32
# What also ends a call without a reason: one whose message has not come when the service stops, or
# when too many wait for theirs; and gRPC at a deadline that the service's clock sees first.
UNHEARD = (*PASSES, grpc.StatusCode.CANCELLED)
DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class CannotRun(Exception):
    """This machine does not let the fault be injected."""


@dataclass
class Found:
    """Of one round, or of many. `lost`, `wrong` and `defects` have a line for each."""

    injected: int = 0
    writes: int = 0
    lookups: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        """All that must not be."""
        kinds = (("lost", self.lost), ("wrong", self.wrong), ("defect", self.defects))
        return [f"{kind}: {each}" for kind, those in kinds for each in those]

    def add(self, other: Found) -> None:
        """Another round's."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def blame(self, error: Exception) -> None:
        """What ended a round, by what it says."""
        match error:
            case Lost():
                self.lost += error.problems
            case Wrong() | ReplicaViolation():
                self.wrong.append(str(error))
            case _:
                self.defects.append(f"{type(error).__name__}: {error}")


class Pulse:
    """How long this machine lets a thread wait that wants to run, from __enter__ to __exit__: it may be busy."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        began_s = time.monotonic()
        while not self._ended.wait(_BEAT_S):
            now_s = time.monotonic()
            self.longest_s = max(self.longest_s, now_s - began_s - _BEAT_S)
            began_s = now_s


class Round:
    """From __enter__ to __exit__. All that is random follows from the seed; moments do not."""

    def __init__(self, directory: Path, seed: int, scale: float = 1.0) -> None:
        """`directory`: empty; `scale`: of the times that faults last."""
        self.directory, self.seed, self.scale = directory, seed, scale
        self.rng = np.random.default_rng(seed)
        self.found = Found()
        self.stack = ExitStack()
        self._pulse = self.stack.enter_context(Pulse())

    @property
    def hang_s(self) -> float:
        """See HANG_S."""
        return HANG_S + _STEPS * self._pulse.longest_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def pause(self, least_s: float, most_s: float | None = None) -> None:
        """A fault lasts, by chance between the two."""
        most_s = least_s if most_s is None else most_s
        time.sleep(self.scale * self.rng.uniform(least_s, most_s))

    def serve(
        self,
        *flags: str,
        data: Path | None = None,
        listen: str = "127.0.0.1:0",
        backend: str = "edge",
    ) -> Sidecar:
        """A service, half of the time with an engine process for each layer."""
        isolate = ["--isolate-above-mib", str(self.rng.choice([0, 64]))]
        with_all = [*isolate, "--min-free-mib", "64", *flags]
        return self.stack.enter_context(
            Sidecar(data or self.directory / "data", backend=backend, listen=listen, flags=with_all)
        )

    def serve_again(self, service: Sidecar, *flags: str, backend: str = "edge") -> Sidecar:
        """After its end, at the same address."""
        service.close_channel()
        return self.serve(*flags, data=service.data, listen=service.target, backend=backend)

    def injects(self, times: int = 1) -> None:
        self.found.injected += times

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.found.defects.append(otherwise)

    def require_refused(self, data: Path, *words: str, backend: str = "edge") -> None:
        """A start on this directory ends with one line that says why."""
        ended = serve_and_fail("--data", str(data), "--listen", "127.0.0.1:0", "--backend", backend)
        right = ended.returncode in (1, 2) and all(word in ended.stderr for word in words)
        self.require(
            right and "Traceback" not in ended.stderr,
            f"a start ended with {ended.returncode} and not with {words}: {ended.stderr[-500:]}",
        )

    @contextmanager
    def load(self, service: Sidecar, *, held_s: float = 0.0) -> Iterator[Load]:
        """Writers and a reader; afterwards what was acknowledged is compared.

        `held_s`: how long the fault may keep a call, beside what it takes anyway.
        """
        load = Load([service], keep=KEPT)
        try:
            with load:
                load.wait_for_more(acknowledged=5, lookups=5)
                yield load
                with load.at_rest():
                    self.found.lost += load.problems()
        finally:
            self._take(load, held_s)

    def _take(self, load: Load, held_s: float) -> None:
        for problem in load.wrong:
            (self.found.wrong if " found by " in problem else self.found.defects).append(problem)
        self.found.writes += load.done["acknowledged"]
        self.found.lookups += load.done["lookups at 0"] + load.done["checks"]
        self.require(
            load.longest_s <= self.hang_s + held_s,
            f"a call took {load.longest_s:.1f} s ({held_s:g} held, a thread up to {self._pulse.longest_s:.2f} s)",
        )

    def recover(self, load: Load, began_s: float | None = None) -> None:
        """Until a write is acknowledged and what it wrote is found, from `began_s` (now) on."""
        began_s = time.monotonic() if began_s is None else began_s
        load.wait_for_more(acknowledged=1, lookups=1, checks=1)
        self.found.recoveries_s.append(time.monotonic() - began_s)

    def attempt(self, what: str, call: Callable[[], Any], *, hangs: bool = True) -> str:
        """The status of a call that may be refused, and must not be a defect; `hangs`: nor have no answer."""
        began_s = time.monotonic()
        try:
            call()
            code = grpc.StatusCode.OK
        except grpc.RpcError as refused:
            error = service_error(refused)
            code = error.code
            late = hangs and code is grpc.StatusCode.DEADLINE_EXCEEDED
            self.require(
                code not in DEFECTS and not late, f"{what}: {code.name}: {error.message[:300]}"
            )
        took_s = time.monotonic() - began_s
        self.require(took_s <= HANG_S + self.hang_s, f"{what} took {took_s:.1f} s")
        return code.name


class Storm:
    """Callers, each with a channel of its own, who look up without pause what nobody changes.

    What they are answered is right, or a refusal that passes.
    """

    def __init__(
        self,
        load: Load,
        service: Sidecar,
        callers: int,
        timeouts_s: Sequence[float] = (HANG_S,),
        *,
        in_message: bool = False,
    ) -> None:
        """`timeouts_s`: each call has one of these; `in_message`: the message says so too."""
        self._load, self._timeouts_s, self._in_message = load, timeouts_s, in_message
        self.done: Counter[str] = Counter()
        self._ended, self._lock = False, threading.Lock()
        self._callers = [Caller(service, load.digest) for _ in range(callers)]
        self._threads = [
            threading.Thread(target=self._call, args=(number,)) for number in range(callers)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()
        for caller in self._callers:
            caller.channel.close()

    def _call(self, number: int) -> None:
        rng = np.random.default_rng(number)
        while not self._ended:
            code = self._ask(self._callers[number], float(rng.choice(self._timeouts_s)))
            with self._lock:
                self.done[code.name] += 1

    def _ask(self, caller: Caller, timeout_s: float) -> grpc.StatusCode:
        timeout_us, kept = int(1e6 * timeout_s) if self._in_message else 0, list(self._load.kept)
        try:
            found = caller.nearest(
                0, self._load.kept_keys, timeout_s=timeout_s, timeout_us=timeout_us
            )
        except grpc.RpcError as error:
            if error.code() not in self._load.passes:
                self._load.blame(f"in the storm: {error.code().name}: {error.details()}")
            return error.code()
        if found != kept:
            self._load.blame(f"layer 0: {kept} are there, {found} found by a caller of the storm")
        return grpc.StatusCode.OK
