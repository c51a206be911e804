"""Piecewise graphs: vLLM's compiler cuts the model at each lookup, which runs between two replays.

vLLM compiles and cuts on the CPU as it does for CUDA; in the place of its CUDA graphs are pieces
that keep to the rules of a replay: nothing of the lookup runs in it, inputs are read where they were at capture, and
outputs are written where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from torch import Tensor

from tests.sidecar import Sidecar
from tests.vllm.ask import apart, ask, engine
from tests.vllm.models import NEW_TOKENS, Checkpoint, fill, prompts, with_memory, written

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from model_runner.vllm import op

LAYERS, TOLERANCE = 3, 2e-5
TEXTS = prompts(3)
# Operations that vLLM cuts out, by layer: attention by itself, the lookup since the plug-in says so.
ATTENTION = ["vllm.unified_kv_cache_update", "vllm.unified_attention_with_output"]
CUTS = [ATTENTION, ["knn_moe.route_"]] * LAYERS


class Piece:
    """In the place of vLLM's CUDAGraphWrapper, one per piece; a graph for each size of a batch.

    Attributes:
        replays: of all pieces together.

    """

    replays: ClassVar[int] = 0

    def __init__(self, runnable: Callable[..., Any], **_: Any) -> None:
        self._runnable = runnable
        self._captured: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if get_forward_context().cudagraph_runtime_mode.name == "NONE":  # a long prompt
            return self._runnable(*args)
        shapes = tuple(arg.shape if isinstance(arg, Tensor) else arg for arg in args)
        if shapes not in self._captured:
            self._captured[shapes] = args, self._run(args)
            return self._captured[shapes][1]
        inputs, outputs = self._captured[shapes]
        Piece.replays += 1
        for output, new in zip(_tensors(outputs), _tensors(self._run(inputs)), strict=True):
            output.copy_(new)
        return outputs

    def _run(self, args: tuple[Any, ...]) -> Any:
        running, op._here.running = op._here.running, None
        try:
            return self._runnable(*args)
        finally:
            op._here.running = running


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """vLLM compiles on the CPU as for CUDA. What it cut out is noted: the operations between pieces, in order."""
    from vllm.compilation import backends
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    update, split, found = CpuPlatform.check_and_update_config, backends.split_graph, []

    def updated(vllm_config: Any) -> None:
        update(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
        compilation.cudagraph_mode, compilation.compile_sizes = CUDAGraphMode.PIECEWISE, []
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = [4], 4

    def noted(graph: Any, splitting_ops: list[str]) -> Any:
        whole, items = split(graph, splitting_ops)
        found.extend(
            [str(node.target) for node in item.graph.graph.nodes if node.op == "call_function"]
            for item in items
            if item.is_splitting_graph
        )
        return whole, items

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(updated))
    monkeypatch.setattr(backends, "split_graph", noted)
    name = f"{Piece.__module__}.{Piece.__qualname__}"
    wrapper = staticmethod(lambda: name)
    monkeypatch.setattr(CpuPlatform, "get_static_graph_wrapper_cls", wrapper)
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    return found


@pytest.mark.parametrize(("family", "retrieval"), [("qwen3_moe", "remote"), ("olmoe", "replica")])
def test_lookups_are_between_pieces(
    family: str,
    retrieval: str,
    cuts: list[list[str]],
    checkpoint: Callable[[str], Checkpoint],
    sidecar: Sidecar,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, name = checkpoint(family), f"pieces-{retrieval}"
    fill(sidecar, name, model, TEXTS)
    config = {"target": sidecar.target, "memories": [name], "retrieval": retrieval}
    config["timeout_s"] = 20
    before = Piece.replays
    capturing = list[bool]()

    def capture(runner: Any) -> int:
        [serving] = llm.collective_rpc(lambda worker: worker.knn_moe_salt.__self__)
        follower = serving.memories[name].opened.follower
        capturing.append(follower is None or follower._working.locked())
        return 0

    monkeypatch.setattr(GPUModelRunner, "capture_model", capture)
    with engine(model.path, config, enforce_eager=False) as llm:
        llm.collective_rpc(lambda worker: worker.model_runner.capture_model())
        plain, remembered = ask(llm, TEXTS), ask(llm, TEXTS, name)
        [status] = llm.collective_rpc("knn_moe_status")
    assert capturing == [True]  # meanwhile no other thread asks anything of the device
    assert cuts == CUTS
    # Of all batches of 3 tokens, padded to 4, the first one is captured.
    assert Piece.replays - before == (2 * (NEW_TOKENS - 1) - 1) * (len(CUTS) + 1)
    assert (status["hooked"], status["layers"], status["missed"]) == (3, 3, [])
    assert apart(plain, written(model, TEXTS)) < TOLERANCE
    assert apart(remembered, with_memory(model, sidecar.target, name, TEXTS)) < TOLERANCE


def test_a_lookup_that_was_captured_is_said(
    cuts: list[list[str]],
    checkpoint: Callable[[str], Checkpoint],
    sidecar: Sidecar,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the first forward passes, of long prompts, are not captured."""
    model = checkpoint("olmoe")
    fill(sidecar, "captured", model, TEXTS)
    monkeypatch.setattr("model_runner.vllm.limits.cut_at_lookups", lambda compilation: None)
    config = {"target": sidecar.target, "memories": ["captured"]}
    with engine(model.path, config, enforce_eager=False) as llm:
        ask(llm, TEXTS, "captured")
        [status] = llm.collective_rpc("knn_moe_status")
    assert cuts == [ATTENTION] * LAYERS
    assert (status["hooked"], len(status["missed"])) == (0, LAYERS)
