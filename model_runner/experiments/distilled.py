"""A memory distilled into a small network per layer: router input in, logit delta out, and no lookup.

The networks are fitted to deltas by least squares. What they learn is the mean delta at a router input, which is what a
memory's average of neighbours estimates; general text, at which the delta is to be zero, keeps them from speaking
where the reference has nothing to say. Rounds as in boosting: with the networks on, the next step is added to what they
say, and they are fitted again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from model_runner.experiments.arms import Fitted, Timed
from model_runner.experiments.study import Study
from model_runner.experiments.sweeps import changes, worth
from model_runner.memory_builder.recipes import RECOMMENDED, RECOMMENDED_STEP_SIZE, step, step_sizes
from model_runner.memory_builder.traces import GradientSettings, traced_windows
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.texts import Window, batched, make_batch

# Of what the networks say: the one whose worth on dev is best is taken.
SCALES = (0.5, 1.0, 1.5, 2.0)
# Tokens of general text for each of the reference: with as many the harm was twice as large on dev, with four times as
# many the gain was three quarters (docs/experiments.md).
GENERAL_TOKENS = 2


class Network(nn.Module):
    """Router input [T, d] to logit delta [T, N]: two layers, inputs centred and scaled as those it was fitted to."""

    def __init__(self, inputs: Tensor, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("centre", inputs.mean(0))
        self.register_buffer("scale", (inputs - inputs.mean(0)).square().mean().sqrt())
        self.into, self.out = nn.Linear(inputs.shape[1], hidden), nn.Linear(hidden, experts)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, router_input: Tensor) -> Tensor:
        """[T, N] in f32."""
        centre, scale = self.get_buffer("centre"), self.get_buffer("scale")
        scaled = (router_input.float() - centre) / scale
        found: Tensor = self.out(nn.functional.gelu(self.into(scaled)))
        return found


@dataclass(frozen=True, slots=True)
class Fit:
    """How a network is fitted: Adam, until the error on held-out documents has not fallen `patience` times.

    Attributes:
        hidden: units.
        every: steps between two looks at the held-out rows.

    """

    hidden: int = 64
    batch: int = 1024
    rate: float = 3e-3
    every: int = 25
    patience: int = 4
    most_steps: int = 1500

    def network(self, inputs: Tensor, targets: Tensor, held_out: Tensor, seed: int) -> Network:
        """Of inputs [n, d] and targets [n, N]; held_out: bool [n], rows that are not fitted to."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = Network(inputs, targets.shape[1], self.hidden)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
        generator = torch.Generator().manual_seed(seed)
        rows, best, since = (~held_out).nonzero().flatten(), float("inf"), 0
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        for number in range(1, self.most_steps + 1):
            some = min(self.batch, len(rows))
            picked = rows[torch.randint(len(rows), (some,), generator=generator)]
            with torch.enable_grad():
                loss = (network(inputs[picked]) - targets[picked]).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if number % self.every:
                continue
            error = _error(network, inputs[held_out], targets[held_out])
            if error < best:
                best, since = error, 0
                kept = {name: value.clone() for name, value in network.state_dict().items()}
            elif (since := since + 1) == self.patience:
                break
        network.load_state_dict(kept)
        return network.requires_grad_(False)


@torch.no_grad()
def _error(network: Network, inputs: Tensor, targets: Tensor) -> float:
    return float((network(inputs) - targets).square().mean())


class NetworkPolicy:
    """Adds to each layer's logits what its network says, times a step size per layer."""

    def __init__(self, networks: Sequence[Network], steps: Sequence[float]) -> None:
        self.networks, self._steps = networks, steps

    def __call__(self, call: RouterCall) -> Logits:
        """The logits that the router goes on with."""
        layer = call.site.layer
        with torch.no_grad():
            change = self._steps[layer] * self.networks[layer](call.router_input)
        return Logits(call.router_logits + change.to(call.router_logits))


@dataclass(frozen=True, slots=True)
class DistilledArm:
    """An Arm: networks in the place of a memory, after one pass over the reference and `rounds` more."""

    name: str = "distilled"
    rounds: int = 2
    rate: float = 0.5
    how: Fit = field(default_factory=Fit)

    @contextmanager
    def fit(self, study: Study) -> Iterator[Fitted]:
        """As of Arm. The scale of what the networks say is chosen on dev, as settings of memories are."""
        study.traces()
        study.general_inputs()
        started = time.perf_counter()
        networks = self._networks(study)
        policies = [NetworkPolicy(networks, _steps(networks, scale)) for scale in SCALES]
        best = max(policies, key=lambda policy: worth(changes(study, policy, "dev", self.name)))
        fit_s = study.made_s("traces", "general inputs") + time.perf_counter() - started
        numbers = sum(p.numel() for network in best.networks for p in network.parameters())
        # Weights, gradients and two moments of the optimizer.
        scorer = partial(study.score, policy=best, what=self.name)
        yield Timed(scorer, fit_s, 16 * numbers, numbers)

    def _networks(self, study: Study) -> list[Network]:
        traces = study.traces()
        norms, layers = traces.norms(), range(len(traces.keys))
        nowhere = _drawn(study.general_inputs(), GENERAL_TOKENS * len(traces.keys[0]), study.seed)
        targets = [
            step(traces.gradients(layer), RECOMMENDED, norms[layer], torch.Generator())
            for layer in layers
        ]
        held_out = _held_out(traces.windows, study.seed)[traces.window_of]
        fitted = [
            self._fitted(traces.keys[n], targets[n], nowhere[n], held_out, study.seed + n)
            for n in layers
        ]
        for _ in range(self.rounds):
            keys, steps = _pass(study, NetworkPolicy(fitted, _steps(fitted, 1.0)), norms)
            fitted = [
                self._fitted(
                    *(keys[n], fitted[n](keys[n]) + self.rate * steps[n], nowhere[n]),
                    *(held_out, study.seed + n),
                )
                for n in layers
            ]
        return fitted

    def _fitted(
        self, keys: Tensor, targets: Tensor, nowhere: Tensor, held_out: Tensor, seed: int
    ) -> Network:
        zeros = targets.new_zeros(len(nowhere), targets.shape[1])
        fitted_to = torch.arange(len(nowhere)) % 10 == 0
        return self.how.network(
            torch.cat([keys, nowhere]),
            torch.cat([targets, zeros]),
            torch.cat([held_out, fitted_to]),
            seed,
        )


def _steps(networks: Sequence[Network], scale: float) -> list[float]:
    return [scale * step for step in step_sizes(len(networks), RECOMMENDED_STEP_SIZE)]


def _drawn(inputs: Sequence[Tensor], count: int, seed: int) -> list[Tensor]:
    """The same `count` tokens of each layer's inputs [m, d], all where there are fewer."""
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    return [each[order[:count].to(each.device)] for each in inputs]


def _held_out(windows: Sequence[Window], seed: int) -> Tensor:
    """[w] bool: the windows of a tenth of the documents, of one at least."""
    names = sorted({window.ref for window in windows}, key=str)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[n] for n in order[: max(1, len(names) // 10)]}
    return torch.tensor([window.ref in chosen for window in windows])


def _pass(
    study: Study, policy: Callable[[RouterCall], Logits], norms: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Router inputs [n, d] and the next steps [n, N] per layer, in the order of the study's traces."""
    keys: list[list[Tensor]] = [[] for _ in norms]
    steps: list[list[Tensor]] = [[] for _ in norms]
    size, loaded = 32, study.loaded
    for group in batched(study.texts.reference, size):
        with RouterHooks(loaded.model, policy):
            traced = traced_windows(
                loaded.model, make_batch(group, loaded.device), GradientSettings()
            )
        for trace in traced.traces:
            n, kept = trace.site.layer, traced.kept
            keys[n].append(trace.router_input.flatten(0, 1)[kept].float())
            change = step(trace.gradient, RECOMMENDED, norms[n], torch.Generator())
            steps[n].append(change.flatten(0, 1)[kept])
    return [torch.cat(k) for k in keys], [torch.cat(s) for s in steps]


DISTILLED = DistilledArm()
