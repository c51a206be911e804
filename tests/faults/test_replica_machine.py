"""A replica beside the model and what it follows: random work against the oracle, and updates while it is read."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from knnmoe import tensors
from knnmoe.client import AdminClient
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import types_pb2 as types_pb

from model_runner.architectures import Assignment
from model_runner.router_hooks import Logits
from model_runner.routing_policy import Retrieved
from tests.congruence.fast_dir import fast_dir
from tests.faults.replica import LEAST_RECALL, RESTARTS, STEPS
from tests.faults.replica_world import MODEL, PATIENCE_S, Replica, World
from tests.sidecar import EXPERTS, LOGIT_DELTA, Sidecar, random_keys

__all__ = ["fast_dir"]

SEEDS = st.integers(0, 2**31 - 1)
MEMORIES = st.integers(0, 1)
# What is done often, and what takes long and matters most.
OFTEN = ["upsert", "upsert", "delete", "settings", "cut"]
SELDOM = [step for step in STEPS if step not in (*OFTEN, *RESTARTS)]
MOST_RESTARTS = 2


def test_random_work(fast_dir: Path) -> None:
    """`python -m tests.faults.replica --steps 10000` goes on for longer."""
    with World(fast_dir / "data") as world:

        class Machine(RuleBasedStateMachine):
            def __init__(self) -> None:
                super().__init__()
                self.restarts = 0
                world.begin()

            def _do(self, step: str, memory: int, seed: int) -> None:
                world.do(step, memory, seed)
                world.check(seed)

            @rule(step=st.sampled_from(OFTEN), memory=MEMORIES, seed=SEEDS)
            def often(self, step: str, memory: int, seed: int) -> None:
                self._do(step, memory, seed)

            @rule(step=st.sampled_from(SELDOM), memory=MEMORIES, seed=SEEDS)
            def seldom(self, step: str, memory: int, seed: int) -> None:
                self._do("upsert", memory, seed)
                self._do(step, memory, seed)

            # Each takes a second or two.
            @precondition(lambda self: self.restarts < MOST_RESTARTS)
            @rule(how=st.sampled_from(RESTARTS), memory=MEMORIES, seed=SEEDS)
            def restart_the_sidecar(self, how: str, memory: int, seed: int) -> None:
                self.restarts += 1
                self._do("upsert", memory, seed)
                self._do(how, memory, seed)

        # What fails is said as it came: shrinking would start many a sidecar.
        how = settings(
            max_examples=1,
            stateful_step_count=24,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Machine, settings=how)
        assert world.recall >= LEAST_RECALL
        for step in STEPS.keys() - world.done.keys():  # what chance left out
            world.do(step, 0, 7)
            world.check(7)


ENTRIES, BATCHES, ETA = 400, 30, 2.0


def batch(number: int) -> admin_pb.Entries:
    """The same entries each time, all with this one number in their values."""
    keys = random_keys(np.random.default_rng(0), ENTRIES)
    values = np.full((ENTRIES, EXPERTS), number, np.float32)
    return admin_pb.Entries(
        ids=tensors.to_tensor(np.arange(ENTRIES, dtype=np.uint64)),
        keys=tensors.to_tensor(keys),
        logit_deltas=tensors.to_tensor(values),
        provenance=[types_pb.Provenance()] * ENTRIES,
    )


def test_no_lookup_sees_half_an_update(fast_dir: Path) -> None:
    """Each token has neighbours of its own, and all of them are of one batch."""
    with Sidecar(fast_dir / "data") as sidecar:
        how = {"neighbours": 8, "gamma": [1e-3], "step_size": [ETA]}
        sidecar.create("law", model=MODEL, kind=LOGIT_DELTA, **how)
        sidecar.upsert("law", 0, batch(1))
        with Replica(sidecar.target, "law") as replica, AdminClient(sidecar.target) as admin:
            readers = [Reader(replica) for _ in range(2)]
            for number in range(2, BATCHES + 1):
                sidecar.upsert("law", 0, batch(number))
                if number % 10 == 0:
                    replica.follower.catch_up(lambda: admin.describe("law"), PATIENCE_S)
                    for reader in readers:
                        reader.wait_for(number)
            seen = [reader.end() for reader in readers]
        sidecar.stop_cleanly()
    for numbers in seen:
        assert numbers == sorted(numbers)
        assert set(numbers) <= set(range(1, BATCHES + 1))


class Reader:
    """Looks up without pause; keeps which batches it saw in turn, and -1 for a mixture of several."""

    def __init__(self, replica: Replica) -> None:
        self._replica, self._seen, self._ending = replica, [0], False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def wait_for(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._seen[-1] in (number, -1), PATIENCE_S)

    def end(self) -> list[int]:
        self._ending = True
        self._thread.join()
        return self._seen[1:]

    def _read(self) -> None:
        while not self._ending:
            number = of_which_batch(self._replica)
            if number != self._seen[-1]:
                with self._changed:
                    self._seen.append(number)
                    self._changed.notify_all()


def of_which_batch(replica: Replica) -> int:
    inputs = torch.from_numpy(random_keys(np.random.default_rng(1), 64))
    own = Assignment(torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.int64))
    found = replica.retriever.lookup(0, inputs, torch.zeros(64, EXPERTS), own)
    assert isinstance(found, Retrieved)
    assert isinstance(found.blended, Logits)
    carried = found.blended.router_logits / found.lambdas.unsqueeze(1) / ETA
    number = carried[0, 0].round()
    return int(number) if torch.allclose(carried, number, rtol=0, atol=1e-3) else -1
