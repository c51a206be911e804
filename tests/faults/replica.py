"""Random work on two memories of one sidecar, which replicas follow through it all: against NumPy, and against Route.

    python -m tests.faults.replica --steps 10000 --seed 0
    python -m tests.faults.replica --steps 1000 --first-pass pca
    python -m tests.faults.replica --steps 1000 --first-pass auto

Entries come, are replaced and deleted; memories are pruned, indexed, read otherwise, brought back from snapshots and
replaced; the stream is cut, the sidecar is killed, also while it writes. After each step the replicas catch up to what
was acknowledged, hold exactly that, and answer like Route and like NumPy in float64. With a first pass, in larger
layers, what they find is there, and the nearest is found; a scan of bytes (`auto`) answers like NumPy too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_runner.replica import native
from tests.faults.replica_oracle import Violation
from tests.faults.replica_world import LARGE, SCANNED, SMALL, Size, World
from tests.faults.results import say

LEAST_RECALL = 0.99
SIZES = {"exact": SMALL, "pca": LARGE, "auto": SCANNED}
# How often each step is taken, of a thousand.
STEPS = {
    "upsert": 529,
    "delete": 380,
    "settings": 40,
    "cut": 20,
    "prune": 10,
    "cut_off": 5,
    "snapshot": 4,
    "restore": 4,
    "replace": 3,
    "optimize": 2,
    "restart": 1,
    "kill": 1,
    "kill_while_it_writes": 1,
}
# Those of them that end the sidecar.
RESTARTS = ("restart", "kill", "kill_while_it_writes")


def run(
    steps: int, seed: int, check_every: int, size: Size, say: Callable[[str], None]
) -> dict[str, Any]:
    """So many random steps. Raises Violation, which names the step and its seed."""
    rng = np.random.default_rng(seed)
    weights = np.array(list(STEPS.values()))
    with tempfile.TemporaryDirectory() as made, World(Path(made) / "data", size) as world:
        world.begin()
        for number in range(steps):
            step = str(rng.choice(list(STEPS), p=weights / weights.sum()))
            memory, own_seed = int(rng.integers(2)), int(rng.integers(2**31))
            try:
                world.do(step, memory, own_seed)
                if number % check_every == 0 or step not in ("upsert", "delete"):
                    world.check(own_seed)
            except Exception as error:
                raise Violation(f"step {number}, {step}({memory}, {own_seed}): {error}") from error
            if number % 500 == 499:
                say(f"step {number + 1}/{steps}: {dict(world.done)}")
        world.check(seed)
        if world.recall < LEAST_RECALL:
            raise Violation(f"recall@1 {world.recall:.4f}, expected at least {LEAST_RECALL}")
        return {
            "steps": dict(world.done),
            "recall_at_1": world.recall,
            "tokens": world._asked,
            "scanned_as_bytes": world.scanned,
            "layers_with_a_first_pass": world.first_passes(),
        }


def main() -> int:
    """Prints the result as JSON; status 1 when a replica was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check-every", type=int, default=1, help="upserts and deletions between two comparisons"
    )
    parser.add_argument("--first-pass", choices=SIZES, default="exact")
    arguments = parser.parse_args()
    size = SIZES[arguments.first_pass]
    if arguments.first_pass == "auto" and native.compiled() is None:
        say("nothing scans keys as bytes here: it was not compiled")
        return 1
    torch.set_num_threads(1)
    try:
        result = run(arguments.steps, arguments.seed, arguments.check_every, size, say)
    except Violation as violation:
        say(f"broken: {violation} (seed {arguments.seed})")
        return 1
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
