"""A model that generates with a memory, the sidecar that has it, and what happens to that sidecar."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from knnmoe import tensors
from knnmoe.client import AdminClient, ExampleRef, ServiceUnavailable
from numpy.typing import NDArray
from torch import Tensor

from model_runner.architectures import Assignment
from model_runner.memory_builder.builder import MemoryBuilder, Target, collect_router_inputs
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import LoadedModel
from model_runner.progress import Progress
from model_runner.retrieval import OpenMemory, Retrieval, open_retriever
from model_runner.router_client import CircuitBreaker, OnError, RouterClient
from model_runner.router_hooks import Logits, RouterHooks
from model_runner.routing_policy import FellBack, RetrievalPolicy, Retrieved
from model_runner.texts import Window
from model_runner.wire import encode_by_layer
from tests.faults.crowd import Crowd
from tests.faults.replica_oracle import Entry, Truth
from tests.qdrant_standin import StandInProcess, TcpFaults
from tests.scraping import FLAGS, Scraped, url_of
from tests.sidecar import Sidecar, exported

MEMORY = "recommended"
# How a replica is read that says so when it has not heard from the sidecar for a while.
STALE_S = 2.0
_QUIET = Progress(quiet=True)
_DESCRIBED_S = 60.0
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Made:
    """A lookup of T tokens that the model made. Times are of time.monotonic()."""

    layer: int
    inputs: F32  # [T, d]
    logits: F32  # [T, N]
    found: Retrieved | FellBack
    began_s: float
    ended_s: float

    @property
    def reason(self) -> str | None:
        """Why it fell back."""
        return self.found.reason if isinstance(self.found, FellBack) else None

    @property
    def waited(self) -> bool:
        """Whether a sidecar may have been asked."""
        return self.reason != "breaker_open"


@dataclass(frozen=True, slots=True)
class Token:
    """One that was generated, in so many seconds; `plain`: whether as without a memory, None: not all fell back."""

    number: int
    phase: str
    took_s: float
    ended_s: float
    lookups: list[Made]
    plain: bool | None

    @property
    def answered(self) -> bool:
        """Every lookup of it."""
        return all(each.reason is None for each in self.lookups)


class Recording:
    """A retriever that keeps what another was asked and said; nothing is under way while `between` is held."""

    def __init__(self, retriever: Any, between: threading.Lock) -> None:
        self.retriever, self._between = retriever, between
        self.made: list[Made] = []
        self.held_s = 0.0  # by those who looked between two lookups

    def lookup(
        self, layer: int, router_input: Tensor, router_logits: Tensor, own: Assignment, **rest: Any
    ) -> Retrieved | FellBack:
        """What the other says."""
        came = time.monotonic()
        with self._between:
            began = time.monotonic()
            found = self.retriever.lookup(layer, router_input, router_logits, own, **rest)
            ended = time.monotonic()
        self.held_s += began - came
        asked = (each.float().numpy().copy() for each in (router_input, router_logits))
        self.made.append(Made(layer, *asked, found, began, ended))
        return found


class Writer:
    """Writes one text after the other with a memory, token by token, the likeliest each time."""

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        prompts: Sequence[Tensor],
        retriever: RouterClient | OpenMemory,
        between: threading.Lock,
        length: int,
    ) -> None:
        self.name, self.retriever = name, retriever
        self.opened = retriever if isinstance(retriever, OpenMemory) else None
        source = retriever.retriever if isinstance(retriever, OpenMemory) else retriever
        self._recording = Recording(source, between)
        self.policy = RetrievalPolicy(self._recording)
        self.tokens: list[Token] = []
        self._plain, self._model = loaded.model, copy.deepcopy(loaded.model)
        self.hooks = RouterHooks(self._model, self.policy)
        self._prompts, self._length = prompts, length
        self.rewind()

    def rewind(self) -> None:
        """Begins with the first text again."""
        self._text, self._left = 0, 0
        self._cache: Any = None
        self._ids = self._prompts[0]

    def step(self, phase: str) -> Token:
        """The next token."""
        if not self._left:
            self._ids = self._prompts[self._text % len(self._prompts)]
            self._text, self._left, self._cache = self._text + 1, self._length, None
        self._left -= 1
        before = copy.deepcopy(self._cache)
        self._recording.held_s, first = 0.0, len(self._recording.made)
        began = time.monotonic()
        with torch.no_grad():
            output = self._model(self._ids, past_key_values=self._cache, use_cache=True)
            chosen = output.logits[:, -1:].argmax(-1)
        ended = time.monotonic()
        lookups = self._recording.made[first:]
        plain = None
        if all(each.reason is not None for each in lookups):
            plain = torch.equal(output.logits, self._without(before))
        took_s = ended - began - self._recording.held_s
        self._cache, self._ids = output.past_key_values, chosen
        self.tokens.append(Token(len(self.tokens), phase, took_s, ended, lookups, plain))
        return self.tokens[-1]

    def is_back(self, over_s: float) -> bool:
        """Whether all is as before the fault that ended then: a token's lookups are answered, a replica is in step."""
        token = self.tokens[-1]
        if not token.answered or token.lookups[0].began_s < over_s:
            return False
        follower = None if self.opened is None else self.opened.follower
        return follower is None or time.monotonic() - follower.staleness_s >= over_s

    def _without(self, cache: Any) -> Tensor:
        with torch.no_grad():
            return self._plain(self._ids, past_key_values=cache, use_cache=True).logits


@dataclass(slots=True)
class Life:
    """One process of the sidecar: since when, and what it had counted at a moment between two lookups.

    Attributes:
        first: nobody had asked for it before it listened.
        others: lookups of other clients, by what became of them.

    """

    url: str
    began_s: float
    first: bool
    others: Counter[str] = field(default_factory=Counter)
    scraped: Scraped | None = None
    scraped_s: float = math.inf

    def lookups(self, where: str) -> int:
        """In the `service`, or in a `replica`."""
        assert self.scraped is not None
        return int(sum(self.scraped.of("lookups_total", memory=MEMORY, where=where).values()))

    def refused(self, method: str, **reason: str) -> int:
        """Calls of a method, for any reason or for one."""
        assert self.scraped is not None
        return int(sum(self.scraped.of("refused_total", method=method, **reason).values()))


@dataclass
class World:
    """A sidecar with a filled memory, from __enter__ to __exit__.

    Attributes:
        over: "unix" or "tcp".
        server: whether the entries lie on a Qdrant server, behind a proxy.

    """

    home: Path
    loaded: LoadedModel
    windows: Sequence[Window]
    over: str
    server: bool = False
    flags: Sequence[str] = ()
    lives: list[Life] = field(default_factory=list)
    between: threading.Lock = field(default_factory=threading.Lock)
    replicas: list[OpenMemory] = field(default_factory=list)
    crowd: Crowd | None = None
    crowded: dict[str, Any] = field(default_factory=dict)
    truths: list[Truth] = field(default_factory=list)

    def __enter__(self) -> World:
        with ExitStack() as stack:
            self._backend = "edge"
            if self.server:
                standin = stack.enter_context(StandInProcess(self.home / "qdrant"))
                self.proxy = stack.enter_context(TcpFaults(standin.port))
                self._backend = self.proxy.url
            self._listen = f"unix:{self.home}/s" if self.over == "unix" else "127.0.0.1:0"
            self.start()
            stack.callback(lambda: self.sidecar.__exit__())
            self._fill()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """The last sidecar must end with 0, and without a traceback."""
        with self._stack:
            if failed is None:
                self.sidecar.stop_cleanly()

    @property
    def target(self) -> str:
        """Of the sidecar, the same in every life."""
        return self.sidecar.target

    def start(self) -> None:
        """Another life, once the one before has ended."""
        if self.lives:
            self.sidecar.__exit__()
        began = time.monotonic()
        self.sidecar = Sidecar(
            self.home / "data",
            backend=self._backend,
            listen=self._listen,
            flags=[*FLAGS, *self.flags],
        )
        self._listen = self.sidecar.target
        self.lives.append(Life(url_of(self.sidecar), began, not self.lives))

    def scrape(self) -> Life:
        """What the service has counted, between two lookups of the model."""
        life = self.lives[-1]
        with self.between:
            life.scraped, life.scraped_s = Scraped(life.url), time.monotonic()
        return life

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Scrapes; inside, no replica reports what it looked up."""
        with ExitStack() as stack:
            for opened in self.replicas:
                stack.enter_context(opened.paused())
            self.scrape()
            yield

    def remote(self, deadline_s: float, breaker: CircuitBreaker) -> RouterClient:
        """Lookups in the sidecar; the breaker is as in a model runner."""
        client = RouterClient(
            *(self.target, MEMORY, self.loaded.fingerprint),
            timeout_s=deadline_s,
            on_error=OnError.FALL_BACK,
            breaker=breaker,
        )
        self._stack.callback(client.close)
        give_up_s = time.monotonic() + _DESCRIBED_S
        while True:
            try:
                client.describe()
            except ServiceUnavailable:  # it does not wait long for a busy machine
                if time.monotonic() > give_up_s:
                    raise
            else:
                return client

    def replica(self, stack: ExitStack, max_staleness_s: float | None) -> OpenMemory:
        """Lookups beside the model, until `stack` is closed."""
        how = Retrieval("replica", max_staleness_s=max_staleness_s)
        fingerprint, device = self.loaded.fingerprint, torch.device("cpu")
        opening = open_retriever(self.target, MEMORY, fingerprint, device, how)
        opened = stack.enter_context(opening)
        self.replicas.append(opened)
        return opened

    def _fill(self) -> None:
        preset, layers = PRESETS[MEMORY], self.loaded.fingerprint.num_layers
        with AdminClient(self.target) as client:
            client.find_or_create(
                MEMORY, self.loaded.fingerprint.message(), preset.settings(layers)
            )
            builder = MemoryBuilder(self.loaded.model, self.loaded.fingerprint, client)
            builder.build(self.windows, [Target(MEMORY, preset.recipe)], _QUIET)
            few = self.windows[: max(1, len(self.windows) // 4)]
            inputs = collect_router_inputs(self.loaded.model, few, most=500)
            client.calibrate(MEMORY, preset.lambda0, encode_by_layer(inputs))
            settings = client.describe(MEMORY).settings
        self.truths = [self._truth(layer, settings) for layer in range(layers)]
        self.sidecar.close_channel()

    def _truth(self, layer: int, settings: Any) -> Truth:
        """What lookups in a layer must find: as layer 0 of a memory of its own."""
        entries: dict[int, Entry] = {}
        for part in exported(self.sidecar, MEMORY, layer):
            ids, keys, values = (
                tensors.to_array(each) for each in (part.ids, part.keys, part.logit_deltas)
            )
            for row, number in enumerate(ids.tolist()):
                entries[number] = Entry(keys[row], values[row], ExampleRef("", ""))
        how = {
            "neighbours": settings.neighbours,
            "gamma": [_of_layer(settings.gamma, layer)],
            "step_size": [_of_layer(settings.step_size, layer)],
            "null_weight": settings.null_weight,
            "min_lambda": settings.min_lambda,
            "layers": [0],
        }
        return Truth(settings.kind, settings.similarity, how, [entries])


def _of_layer(values: Sequence[float], layer: int) -> float:
    return values[layer] if len(values) > 1 else values[0]


# A fault happens to a world, says that it has begun, and lasts for as long as lasts() waits.
Happen = Callable[[World, Callable[[], None]], None]


def killed(world: World, lasts: Callable[[], None]) -> None:
    """SIGKILL, while a lookup may be under way."""
    with world.last_words():
        world.sidecar.kill()
    lasts()
    world.start()


def stopped(world: World, lasts: Callable[[], None]) -> None:
    """SIGSTOP: whoever asks waits."""
    with world.sidecar.paused():
        lasts()


def restarted(world: World, lasts: Callable[[], None]) -> None:
    """SIGTERM, and the next one as soon as it has ended."""
    with world.last_words():
        assert world.sidecar.stop() == 0, world.sidecar.stderr
    world.start()
    lasts()


def overloaded(world: World, lasts: Callable[[], None]) -> None:
    """Other clients of the same memory send ten times what can be served."""
    assert world.crowd is not None
    world.crowd.order("begin")
    lasts()
    world.crowded = world.crowd.order("end")


def cut_off(world: World, lasts: Callable[[], None]) -> None:
    """Nothing comes from the Qdrant server any more, or goes there; connections stay open."""
    world.proxy.black_hole()
    lasts()
    world.proxy.heal()


def refused(world: World, lasts: Callable[[], None]) -> None:
    """The Qdrant server's connections are reset, and new ones refused."""
    world.proxy.refuse()
    world.proxy.reset()
    lasts()
    world.proxy.heal()


def values_of(made: Made) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lambdas [T] and blended logits [T, N] of an answered lookup."""
    assert isinstance(made.found, Retrieved)
    blended = made.found.blended
    assert blended is None or isinstance(blended, Logits)
    logits = made.logits if blended is None else blended.router_logits.float().numpy()
    return made.found.lambdas.double().numpy(), np.asarray(logits, np.float64)
