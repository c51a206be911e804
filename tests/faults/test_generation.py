"""A tiny model generates while its sidecar is stopped, overloaded, killed and cut off from its server.

`python -m tests.faults.generation` does so with the shipped model, for longer, and measures what a token waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from model_runner.texts import Window
from tests.congruence.fast_dir import fast_dir
from tests.faults.generation import EMBEDDED, REMOTE, REPLICA, Plan, Run, table
from tests.faults.generation_world import World
from tests.integration.runner_parts import LAYERS, SENTENCES, loaded_model, windows_of
from tests.tiny_checkpoint import byte_tokenizer

__all__ = ["fast_dir"]

# How long a lookup waits is nothing to this test: on a busy machine it must be answered, and it must come to an end.
PLAN = Plan(
    tokens=5,
    length=12,
    fault_s=0.0,
    deadline_s=1.0,
    first_pause_s=0.05,
    longest_pause_s=0.2,
    allowance_s=None,
    crowd_tokens=256,
    permits=4,
    pause_s=0.03,  # the machine is shared by the service
)
WINDOWS: Sequence[Window] = [window for window in windows_of() if window.offset == 0]


# A restart is a kill that is over sooner; the command has it too.
HERE = tuple(fault for fault in EMBEDDED if fault != "restarted")


@pytest.mark.parametrize(
    ("faults", "server"), [(HERE, False), (("cut_off",), True)], ids=["embedded", "server"]
)
def test_a_token_always_comes(fast_dir: Path, faults: Sequence[str], server: bool) -> None:
    """Without the memory it is the plain model's, with it what NumPy says; and every counter adds up."""
    tokenizer = byte_tokenizer()
    prompts = [tokenizer(text[:12], return_tensors="pt").input_ids for text in SENTENCES]
    flags = ["--max-in-flight", str(PLAN.permits)]
    with World(fast_dir, loaded_model(), WINDOWS, "unix", server, flags) as world:
        run = Run(world, PLAN, prompts)
        run.all(faults, (REMOTE, REPLICA), lambda _: None)
    assert run.wrong == []
    assert [each.wrong for each in run.outcomes] == [[]] * len(run.outcomes)
    assert [(each.fault, each.retrieval) for each in run.outcomes] == [
        (fault, retrieval) for fault in faults for retrieval in (REMOTE, REPLICA)
    ]
    for outcome in run.outcomes:
        assert outcome.lookups.total == LAYERS * len(outcome.during)
        if outcome.retrieval == REMOTE and outcome.fault != "overloaded":
            assert any(token.plain for token in outcome.during)
        elif outcome.retrieval == REMOTE:
            assert outcome.lookups.fell_back["overloaded"] > 0
            assert outcome.crowd["resource_exhausted"] > 0
    shown = table([each.row() for each in run.outcomes]).splitlines()
    assert sum(line.startswith("|") for line in shown) == 2 + len(run.outcomes)
