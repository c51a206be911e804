"""Which Mixture-of-Experts families the hooks and the memories serve: `python -m benchmarks.families`.

Every family that the installed transformers can build, as a tiny random model of its own configuration, against a
service of its own. What holds is measured, not declared; a family for which something does not hold is named, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from knnmoe.client import AdminClient, ExampleRef
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks import report
from model_runner.architectures import Assignment, find_router_sites
from model_runner.errors import RunnerError
from model_runner.evaluation.nll import difference
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.recipes import PRESETS, step_sizes
from model_runner.progress import Progress
from model_runner.router_client import OnError, RouterClient
from model_runner.router_hooks import Logits, Policy, RouterCall, RouterHooks, verify_hooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import Scores, score
from model_runner.sidecar import running_sidecar
from model_runner.texts import Window
from tests.families import FAMILIES, FAMILIES_HERE, UNSERVED, missing, prompt, tiny_model

MEMORIES = ("recommended", "paper", "paper-v2")
LAMBDA0 = 0.5
# So that the property which is checked is a gradient's: each token reads its own entry, since with random weights
# its neighbours mean nothing, and steps are a ninth of the preset's, since losses bend within a full one.
NEIGHBOURS, STEP_SIZE = 1, 0.25
TIMEOUT_S = 60.0
# Families in which most weights have no gradient, and why: a memory has little to go by.
NO_GRADIENT = {
    "phimoe": "scores not within 2 % of the best are masked, so that most weights are exactly 1"
}
_WINDOWS, _WINDOW_TOKENS = 4, 12
_QUIET = Progress(quiet=True)
_HAS_EXPERTS = re.compile(r"^class \w*(?:Experts|Router|MoE|Moe)\w*\(", re.MULTILINE)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Row:
    """What holds for one family.

    Attributes:
        layers, experts, top_k: of the tiny model's routers.
        hooks: every router is seen, in order.
        identity: the dtypes in which policies that change nothing leave logits and a greedy answer bit-identical.
        memories: by preset, the change of NLL in nats on the text that the memory was built from; negative is better.
        empty: an empty memory of each preset leaves the logits bit-identical, and so does leaving the context.
        failures: what did not hold, in words.

    """

    family: str
    model_class: str = ""
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    hooks: bool = False
    identity: list[str] = field(default_factory=list)
    memories: dict[str, float] = field(default_factory=dict)
    empty: bool = True
    failures: list[str] = field(default_factory=list)


def rows(families: Sequence[str] = FAMILIES_HERE) -> Iterator[Row]:
    """A row per family, as soon as it is there; starts a service in RAM's temporary directory."""
    transformers.logging.set_verbosity_error()
    with (
        tempfile.TemporaryDirectory() as directory,
        running_sidecar(Path(directory) / "data", Path(directory) / "log") as target,
    ):
        for family in families:
            yield _row(family, target)


def moe_model_types() -> list[str]:
    """Model types of causal LMs of the installed transformers whose code has experts or a router."""
    root = Path(transformers.__path__[0]) / "models"
    return [
        model_type
        for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if any(
            _HAS_EXPERTS.search(source.read_text(encoding="utf-8"))
            for source in (root / model_type_to_module_name(model_type)).glob("modeling_*.py")
        )
    ]


def text_parts() -> dict[str, str]:
    """Model types without a row that wrap a language model which has one: {"gemma4": "gemma4_text"}."""
    others = set(moe_model_types()) - set(FAMILIES) - set(UNSERVED)
    return {each: f"{each}_text" for each in sorted(others)}


def _row(family: str, target: str) -> Row:
    row = Row(family)
    with _noted(row, "hooks"):
        model = tiny_model(family)
        sites = find_router_sites(model)
        row.model_class, row.layers = type(model).__name__, len(sites)
        row.experts, row.top_k = sites[0].num_experts, sites[0].top_k
        verify_hooks(model)
        row.hooks = True
        for name, dtype in _DTYPES.items():
            if not missing(family, dtype):
                _identity(row, name, tiny_model(family, dtype))
        for preset in MEMORIES:
            with _noted(row, preset):
                _memory(row, model, preset, target)
    return row


@contextmanager
def _noted(row: Row, what: str) -> Iterator[None]:
    """What the runner refuses is a finding of the row."""
    try:
        yield
    except RunnerError as error:
        row.failures.append(f"{what}: {error}")


def _identity(row: Row, dtype: str, model: nn.Module) -> None:
    plain, answer = _logits(model), _answer(model)
    for policy in (_no_reply, _own_assignment, _own_logits):
        with RouterHooks(model, policy):
            same = torch.equal(_logits(model), plain) and torch.equal(_answer(model), answer)
        if not same:
            row.failures.append(f"identity in {dtype}: {policy.__name__[1:]} changes the output")
            return
    row.identity.append(dtype)


def _memory(row: Row, model: nn.Module, preset: str, target: str) -> None:
    fingerprint, memory = model_fingerprint(model), f"{row.family}-{preset}"
    plain, plain_scores = _logits(model), _scores(model, None)
    with (
        AdminClient(target) as admin,
        RouterClient(
            target, memory, fingerprint, on_error=OnError.RAISE, timeout_s=TIMEOUT_S
        ) as client,
    ):
        settings = PRESETS[preset].settings(fingerprint.num_layers)
        settings.neighbours = NEIGHBOURS
        if settings.step_size:
            settings.step_size[:] = step_sizes(fingerprint.num_layers, STEP_SIZE)
        admin.find_or_create(memory, fingerprint.message(), settings)
        policy = RetrievalPolicy(client)
        with RouterHooks(model, policy):
            unchanged = torch.equal(_logits(model), plain)
        targets = [Target(memory, PRESETS[preset].recipe)]
        MemoryBuilder(model, fingerprint, admin).build(_windows(), targets, _QUIET)
        admin.calibrate(memory, LAMBDA0)
        change = difference(_scores(model, policy), plain_scores).delta
        admin.delete(memory)
    row.empty = row.empty and unchanged and torch.equal(_logits(model), plain)
    row.memories[preset] = round(change, 6)
    if not row.empty:
        row.failures.append(f"{preset}: an empty memory, or one that is left, changes the output")
    if not change < 0 and row.family not in NO_GRADIENT:
        row.failures.append(f"{preset}: NLL of its own text changes by {change:+.4f}")


def _windows() -> list[Window]:
    return [
        Window(ExampleRef("families", str(number)), tuple(ids), tuple(range(1, len(ids))), 0)
        for number, ids in enumerate(prompt(_WINDOWS, _WINDOW_TOKENS).tolist())
    ]


def _scores(model: nn.Module, policy: Policy | None) -> Scores:
    return score(model, _windows(), policy, _QUIET, what="scoring")


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=prompt()).logits
    return logits


def _answer(model: Any) -> Tensor:
    ids = prompt()
    answer: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return answer


def _no_reply(_: RouterCall) -> None:
    return None


def _own_assignment(call: RouterCall) -> Assignment:
    return Assignment(call.weights.clone(), call.experts.clone())


def _own_logits(call: RouterCall) -> Logits:
    return Logits(call.router_logits.clone())


def markdown(found: Sequence[Row]) -> str:
    """docs/families.md: the table, and what has no row."""
    head = ["family", "class", "routers", "experts, top k", "hooks", "identity", *MEMORIES]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in found]
    served = sum(not row.failures and row.family not in NO_GRADIENT for row in found)
    wrapped = ", ".join(f"{whole} ({part})" for whole, part in text_parts().items())
    unserved = "; ".join(f"{family}: {why}" for family, why in UNSERVED.items())
    no_gradient = "; ".join(f"{family}: {why}" for family, why in NO_GRADIENT.items())
    return _PAGE.format(
        version=transformers.__version__,
        table="\n".join(lines),
        served=served,
        families=len(found),
        wrapped=wrapped,
        unserved=unserved,
        no_gradient=no_gradient,
    )


_PAGE = """# Families

What `python -m benchmarks.families --markdown docs/families.md` found with transformers {version}: every
Mixture-of-Experts causal LM that it can build, as a tiny random model of its own configuration (`tests/families.py`),
against a service. {served} of {families} hold in everything.

- hooks: every router is seen, in the order of the layers.
- identity: policies that give back nothing, the own assignment or the own logits leave logits and a greedy answer
  bit-identical, in these dtypes.
- The last columns: change of NLL in nats on the text that a memory of that preset was built from (negative is better;
  weights are random: that it works, not how much it gains; K = 1, and `recommended` with a ninth of its step). While
  the memory was empty, and after the hooks were gone, the logits were bit-identical.

{table}

All but the last columns, where hardly anything is to be gained: {no_gradient}.
No row of their own, since their language model has one: {wrapped}.
Not served: {unserved}.
How to add a family: [architecture](architecture.md).
"""


def _cells(row: Row) -> list[str]:
    gains = [f"{row.memories[name]:+.4f}" if name in row.memories else "no" for name in MEMORIES]
    return [
        row.family if not row.failures else f"{row.family}: {'; '.join(row.failures)}",
        row.model_class,
        str(row.layers),
        f"{row.experts}, {row.top_k}",
        "yes" if row.hooks else "no",
        ", ".join(row.identity) or "no",
        *gains,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.families", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES_HERE, default=FAMILIES_HERE)
    parser.add_argument("--json", type=Path, help="where the rows are written")
    parser.add_argument("--markdown", type=Path, help="where the page is written")
    options = parser.parse_args(arguments)
    found = []
    for row in rows(options.only):
        found.append(row)
        sys.stdout.write(f"{' | '.join(_cells(row))}\n")
        sys.stdout.flush()
    if options.json:
        made = [asdict(row) for row in found]
        settings = {
            "transformers": transformers.__version__,
            "lambda0": LAMBDA0,
            "neighbours": NEIGHBOURS,
            "step_size": STEP_SIZE,
        }
        written = report.document("families", settings, made, {}, report.load_average())
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(found))
    return int(any(row.failures for row in found))


if __name__ == "__main__":
    sys.exit(main())
