"""Where the plug-in stands in vLLM: five functions, each of which does as before where nothing is configured.

    front end    InputProcessor.process_inputs       checks what a request says, and writes down what a worker needs
                 init_entrypoints_middleware          adds http.Middleware to the OpenAI server
    engine       EngineCore.add_request               salts the prefix cache
                 KVCacheManager.get_computed_blocks   and anew, when lookups fell back while a request waited
    worker       WorkerWrapperBase.init_device        hooks this worker's model, runner and methods, on the instances

All of it is one process, or several; each of them calls install().
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from model_runner.errors import BadInput, UnsupportedModel
from model_runner.vllm.config import KEY, configured
from model_runner.vllm.request import Wanted, settled

_installed = False
_CAPTURING = ("capture_model", "profile_cudagraph_memory")  # of a model runner
_OPENAI_APP = "vllm.entrypoints.launchers.app"


def install() -> None:
    """Puts the five in place, once per process."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(InputProcessor, "process_inputs", _checked)
    _wrap(EngineCore, "add_request", _salted)
    _wrap(KVCacheManager, "get_computed_blocks", _unshared)
    _wrap(WorkerWrapperBase, "init_device", _served)
    if _OPENAI_APP in sys.modules:  # an OpenAI server, which has imported it
        _wrap(sys.modules[_OPENAI_APP], "init_entrypoints_middleware", _with_middleware)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _checked(
    process: Callable[..., Any],
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from vllm.exceptions import VLLMValidationError

    try:
        config = configured(self.vllm_config.additional_config)
        wanted = Wanted.of(getattr(params, "extra_args", None), config)
    except BadInput as error:  # HTTP 400
        raise VLLMValidationError(str(error), parameter=KEY) from error
    request = process(self, request_id, prompt, params, *args, **kwargs)
    own = request.sampling_params
    if own is not None and wanted.memory is not None:
        own.extra_args = {**(own.extra_args or {}), KEY: wanted.settled(request_id)}
    return request


def _salted(add_request: Callable[..., Any], self: Any, request: Any, *args: Any) -> Any:
    params = request.sampling_params
    memory, _ = settled(None if params is None else params.extra_args)
    if memory is not None and request._block_hasher is not None:
        ask = functools.partial(self.model_executor.collective_rpc, args=(memory,))
        ((salt, fell_back), *_) = ask("knn_moe_salt")
        request.knn_moe_salt = _Salt(f"{salt}|{request.cache_salt or ''}", ask)
        request.knn_moe_salt.put(request, fell_back)
    return add_request(self, request, *args)


@dataclass(slots=True)
class _Salt:
    """Of a request in the engine. Attributes: of_version: the part that stays; ask: calls a method of the workers."""

    of_version: str
    ask: Callable[[str], Any]
    fell_back: int = -1

    def put(self, request: Any, fell_back: int) -> None:
        """Keys the request's blocks anew if lookups have fallen back since; it must hold none."""
        if fell_back != self.fell_back:
            self.fell_back = fell_back
            request.cache_salt = f"{fell_back}:{self.of_version}"
            request.block_hashes.clear()
            request.update_block_hashes()


def _unshared(get_computed_blocks: Callable[..., Any], self: Any, request: Any) -> Any:
    """A request may have waited while another one's lookups fell back, which left blocks under the salt of both.

    It holds no blocks when it looks for some. The workers answer after the forward passes that they were given before.
    """
    salt = getattr(request, "knn_moe_salt", None)
    if salt is not None:
        salt.put(request, salt.ask("knn_moe_fell_back")[0])
    return get_computed_blocks(self, request)


def _with_middleware(initialise: Callable[..., Any], args: Any, app: Any, *more: Any) -> Any:
    from model_runner.vllm.http import Middleware

    app.add_middleware(Middleware)  # innermost: behind authentication
    return initialise(args, app, *more)


def _served(init_device: Callable[..., Any], self: Any) -> Any:
    done = init_device(self)
    config = configured(self.vllm_config.additional_config)
    if config is None:
        return done
    from model_runner.vllm.limits import cut_at_lookups, require_served
    from model_runner.vllm.serving import Serving

    require_served(self.vllm_config)
    cut_at_lookups(self.vllm_config.compilation_config)
    serving, worker = Serving(config), self.worker
    runner = worker.model_runner
    worker.load_model = _loading(worker.load_model, self.vllm_config, serving)
    runner._model_forward = _in_forward_pass(runner._model_forward, runner, serving)
    for name in _CAPTURING:
        setattr(runner, name, _while_paused(getattr(runner, name), serving))
    worker.shutdown = _closing(worker.shutdown, serving)
    worker.knn_moe_salt = serving.salt
    worker.knn_moe_fell_back = serving.fell_back
    worker.knn_moe_status = serving.status
    worker.knn_moe_report = serving.report
    return done


def _loading(load_model: Callable[..., Any], vllm_config: Any, serving: Any) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        with _before_packing(vllm_config, serving):
            loaded = load_model(*args, **kwargs)
        if not serving.sites:
            raise UnsupportedModel(
                f"knn_moe: --load-format {vllm_config.load_config.load_format} packs weights before they can be "
                "looked at; take --load-format auto"
            )
        return loaded

    return load


@contextmanager
def _before_packing(vllm_config: Any, serving: Any) -> Iterator[None]:
    """Within it `serving` sees the model when its weights are loaded; packing them empties the router's on a CPU."""
    from vllm.model_executor.model_loader import base_loader

    pack = base_loader.process_weights_after_loading

    def seen(model: nn.Module, model_config: Any, device: torch.device) -> Any:
        if model_config is vllm_config.model_config and not serving.sites:  # no draft model
            serving.load(model, model_config.hf_text_config.model_type, device)
        return pack(model, model_config, device)

    base_loader.process_weights_after_loading = seen
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = pack


def _in_forward_pass(forward: Callable[..., Any], runner: Any, serving: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        ids = batch.req_ids[: batch.num_reqs]
        starts = runner.query_start_loc.np[: len(ids) + 1].tolist()
        with serving.forward_pass(runner.requests, ids, starts):
            return forward(*args, **kwargs)

    return run


def _while_paused(capture: Callable[..., Any], serving: Any) -> Callable[..., Any]:
    """While CUDA graphs are captured no other thread may ask anything of the device."""

    def captured(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as paused:
            for memory in serving.memories.values():
                paused.enter_context(memory.opened.paused())
            return capture(*args, **kwargs)

    return captured


def _closing(shutdown: Callable[[], Any], serving: Any) -> Callable[[], Any]:
    def close() -> Any:
        serving.close()
        return shutdown()

    return close
