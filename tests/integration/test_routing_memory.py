"""RoutingMemory as programs use it: generate, pipelines, streamers, adapters, compiled models, threads, learning."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from knnmoe.client import AdminClient, MemoryNotFound, ModelMismatch, ServiceUnavailable
from knnmoe.v1.types_pb2 import MemorySettings
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from model_runner import (
    ExampleReport,
    MemoryMetrics,
    MemoryReport,
    RetrievalPolicy,
    RoutingMemory,
    model_fingerprint,
)
from model_runner.errors import BadInput, HooksInUse, UnsupportedModel
from model_runner.memory_builder.recipes import PRESETS
from model_runner.progress import Progress
from model_runner.scoring import score
from model_runner.text_files import examples_of
from model_runner.texts import cut_windows
from tests.integration.runner_parts import (
    LAYERS,
    PROMPT,
    REPLY_NAMES,
    SENTENCES,
    build,
    client_of,
    everything,
    generate,
    loaded_model,
    prefill,
    write_text,
)
from tests.sidecar import Sidecar, running_sidecar
from tests.tiny_checkpoint import byte_model, byte_tokenizer

WHERE = pytest.mark.parametrize("where", ["replica", "remote"])
NEW = 6
# Everything is close.
WIDE = MemorySettings(gamma=[1e-3])
TOKENS = len(PROMPT) + NEW - 1


@pytest.fixture(scope="module")
def law(ram_sidecar: Sidecar) -> str:
    """The name of a memory of SENTENCES, to which tests may add."""
    build(ram_sidecar.target, "law", "recommended", settings=WIDE)
    return "law"


def opened(sidecar: Sidecar, name: str, model: Any = None, **options: Any) -> RoutingMemory:
    """Lookups wait for a busy machine."""
    options = {"timeout_s": 30.0, "target": sidecar.target} | options
    return RoutingMemory(loaded_model() if model is None else model, name, **options)


def footprint(model: torch.nn.Module) -> list[object]:
    """Whatever could be left behind on a module."""
    return [
        (name, len(each._forward_hooks), len(each._forward_pre_hooks), vars(each).get("forward"))
        for name, each in model.named_modules()
    ]


@WHERE
@pytest.mark.parametrize("preset", REPLY_NAMES)
def test_one_call(ram_sidecar: Sidecar, name: str, where: str, preset: str) -> None:
    build(ram_sidecar.target, name, preset, settings=WIDE)
    model = loaded_model().model
    before, plain = footprint(model), generate(model)
    with client_of(ram_sidecar.target, name) as client:
        policy = RetrievalPolicy(client)
        expected_ids, expected = generate(model, policy)
    with opened(ram_sidecar, name, retrieval=where) as memory:
        assert memory.where == where
        ids, logits = generate(model)
        within = memory.report
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert not torch.equal(logits, plain[1])
    assert within == memory.report
    assert (within.tokens, within.lookups, within.fallbacks) == (TOKENS, NEW * LAYERS, {})
    assert within.lambda_by_layer == pytest.approx(
        [policy.use[layer].lambda_mean for layer in range(LAYERS)], abs=1e-5
    )
    assert 0 < within.lambda_mean < 1
    assert str(within).startswith(f"{TOKENS} tokens, lambda {within.lambda_mean:.2f} on average (")
    assert str(within).endswith("), fallbacks: none")
    assert footprint(model) == before
    assert torch.equal(generate(model)[1], plain[1])


def test_again_and_never_twice_at_once(ram_sidecar: Sidecar, law: str) -> None:
    model, memory = loaded_model().model, opened(ram_sidecar, law)
    assert memory.report == MemoryReport(())
    for _ in range(2):  # counts anew
        with memory:
            with pytest.raises(HooksInUse, match=f"this RoutingMemory of '{law}' is already enter"):
                memory.__enter__()
            with pytest.raises(HooksInUse, match="already hooked"), opened(ram_sidecar, law):
                pass
            generate(model)
        assert memory.report.tokens == TOKENS


def test_what_is_refused_when_it_is_entered(ram_sidecar: Sidecar, law: str, tmp_path: Path) -> None:
    other = byte_model(num_experts_per_tok=3)
    before = footprint(other)
    with running_sidecar(tmp_path / "gone", backend="exact") as gone:
        pass
    for error, match, memory in [
        (ModelMismatch, "top_k: memory 2, this model 3", opened(ram_sidecar, law, other)),
        (MemoryNotFound, "memory 'nowhere' not found", opened(ram_sidecar, "nowhere")),
        (ServiceUnavailable, gone.target, opened(gone, law)),
        (BadInput, "eval mode", opened(ram_sidecar, law, byte_model().train())),
        (UnsupportedModel, "no MoE layer", opened(ram_sidecar, law, torch.nn.Linear(2, 2))),
    ]:
        with pytest.raises(error, match=match), memory:
            pass
    assert footprint(other) == before
    with opened(ram_sidecar, law):  # nothing is left hooked
        pass


def test_what_cannot_be_asked_for(ram_sidecar: Sidecar, law: str) -> None:
    with pytest.raises(BadInput, match=r"model: got 'allenai/.*', expected .* load_model"):
        RoutingMemory("allenai/OLMoE-1B-7B-0924", law)  # type: ignore[arg-type]
    for wrong, match in [
        ({"memory": None}, "memory: got None, expected the name of a memory"),
        ({"memory": ""}, "memory: got ''"),
        ({"target": None}, "target: got None, expected HOST:PORT or unix:PATH"),
        ({"timeout_s": -1}, "timeout_s: got -1, expected seconds above 0"),
    ]:
        with pytest.raises(BadInput, match=match):
            RoutingMemory(loaded_model(), **{"memory": law, **wrong})  # type: ignore[arg-type]
    with opened(ram_sidecar, law) as memory, pytest.raises(BadInput, match="text: got 3, expected"):
        memory.learn(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="retrieval: got 'near'"):
        opened(ram_sidecar, law, retrieval="near")
    with pytest.raises(BadInput, match="learn: the memory is not open"):
        opened(ram_sidecar, law).learn("text")
    with (
        opened(ram_sidecar, law, loaded_model().model) as memory,
        pytest.raises(BadInput, match=r"tokenizer: got None.*AutoTokenizer"),
    ):
        memory.learn("text")


def test_another_models_tokenizer_is_named(ram_sidecar: Sidecar, law: str) -> None:
    def larger(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1, 10**6, 2]}

    with (
        opened(ram_sidecar, law, loaded_model().model, tokenizer=larger) as memory,
        pytest.raises(
            BadInput, match=r"tokenizer: made token 1000000, expected one of the model's"
        ),
    ):
        memory.explain("text")


def test_a_sidecar_that_dies_while_text_is_generated(tmp_path: Path, name: str) -> None:
    model = loaded_model().model
    plain = generate(model)[1]
    with Sidecar(tmp_path / "data", backend="exact") as dying:
        build(dying.target, name, "recommended", settings=WIDE)
        with opened(dying, name, retrieval="replica") as replica:
            answered = generate(model)[1]
            dying.kill()
            assert torch.equal(generate(model)[1], answered)
        assert replica.report.fallbacks == {}
    with Sidecar(tmp_path / "more", backend="exact") as dying:
        build(dying.target, name, "recommended", settings=WIDE)
        with opened(dying, name, retrieval="remote") as remote:
            generate(model)
            dying.kill()
            assert torch.equal(generate(model)[1], plain)
        report = remote.report
        assert report.tokens == TOKENS
        assert sum(report.fallbacks.values()) == NEW * LAYERS == report.lookups / 2
        assert f"fallbacks: {NEW * LAYERS} of {2 * NEW * LAYERS} (" in str(report)
        looked_up, fell_back = MemoryMetrics(remote).collect()
        assert [sample.value for sample in looked_up.samples] == [report.lookups]
        shown = {sample.labels["reason"]: sample.value for sample in fell_back.samples}
        assert (fell_back.name, shown) == ("knnmoe_fallback", report.fallbacks)


@WHERE
def test_learnt_text_is_in_the_next_answer(
    ram_sidecar: Sidecar, name: str, where: str, tmp_path: Path
) -> None:
    loaded, file = loaded_model(), write_text(tmp_path / "cases.jsonl", SENTENCES[:2])
    with AdminClient(ram_sidecar.target) as admin:
        settings = PRESETS["recommended"].settings(LAYERS)
        for each in (name, f"{name}-2"):
            admin.find_or_create(each, loaded.fingerprint.message(), settings)
            admin.update_settings(each, MemorySettings(gamma=[1e3]))
    with opened(ram_sidecar, name, retrieval=where) as memory:
        assert prefill(loaded.model).isfinite().all()
        assert memory.report.lambda_mean == 0.0
        [report] = memory.learn(PROMPT)
        assert report == ExampleReport(
            report.example, "1", len(PROMPT) - 1, LAYERS * (len(PROMPT) - 1), 0, was_there=False
        )
        before = memory.report
        generate(loaded.model)
        now = memory.report
        assert now.layers[0].lambda_mean * now.tokens > 0.5 * (len(PROMPT) - 1)
        assert now.tokens == before.tokens + TOKENS
        assert [each.was_there for each in memory.learn([PROMPT, {"text": "Other words"}])] == [
            True,
            False,
        ]
        [answered] = memory.learn({"prompt": "Blessed are", "answer": " the meek"}, source="mine")
        assert answered.tokens == len(" the meek")
        by_file = memory.learn(file)
        with pytest.raises(BadInput, match="python: row 2: has"):
            memory.learn([PROMPT, {"txt": "misspelt"}])
        with pytest.raises(BadInput, match="source: got 'a/b'"):
            memory.learn(PROMPT, source="a/b")
    assert [each.name for each in by_file] == ["1", "2"]
    with opened(ram_sidecar, f"{name}-2") as memory:
        memory.learn(PROMPT)
        memory.learn("Other words")
        memory.learn({"prompt": "Blessed are", "answer": " the meek"}, source="mine")
        memory.learn(file)
    assert everything(ram_sidecar, name)[0].keys() == everything(ram_sidecar, f"{name}-2")[0].keys()


@WHERE
def test_an_explanation(ram_sidecar: Sidecar, law: str, where: str) -> None:
    """Its sums are those of an evaluation, its cases say what was learnt, and the report does not count it."""
    text, model = "Woe unto the shepherds.", loaded_model().model
    with opened(ram_sidecar, law, retrieval=where) as memory:
        memory.learn(text, source="taught")
        before = memory.report
        found = memory.explain(text)
        assert memory.report == before
        other = memory.explain(text, source="taught", leave_one_out=True, neighbours=1)
        generate(model)  # hooked again
        assert memory.report.tokens == TOKENS
    windows = cut_windows(examples_of([{"text": text}], "any"), byte_tokenizer(), 512)
    with client_of(ram_sidecar.target, law) as client:
        for policy, nats in ((None, found.plain), (RetrievalPolicy(client), found.routed)):
            expected = score(model, windows, policy, Progress(quiet=True), what="").nll_sums.sum()
            assert nats.sum() == pytest.approx(expected, abs=1e-4)
    nearest = [found.cases[found.layers[0].neighbours[n, 0]] for n in range(len(found.plain))]
    assert {case.source for case in nearest} == {"taught"}
    assert [case.position for case in nearest] == list(range(len(text) - 1))
    assert nearest[-1].snippet.endswith("shepherds.")
    assert "taught" not in {case.source for case in other.cases}


def say(model: Any, streamer: Any) -> None:
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")
    model.generate(
        **ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, streamer=streamer
    )


@WHERE
def test_pipelines_and_streamers(
    ram_sidecar: Sidecar, law: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded_model().model, loaded_model().tokenizer
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with opened(ram_sidecar, law, model, retrieval=where) as memory:
        expected = tokenizer.decode(generate(model)[0][0])
        [said] = pipe(PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        say(model, TextStreamer(tokenizer))
        chunks = TextIteratorStreamer(tokenizer, timeout=60.0)
        thread = threading.Thread(target=say, args=(model, chunks))
        thread.start()
        text = "".join(chunks)
        thread.join()
        assert memory.report.tokens == 4 * TOKENS
    assert said["generated_text"] == expected
    assert capsys.readouterr().out == f"{expected}\n"
    assert text == expected


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)


def test_an_adapter_on_attention(ram_sidecar: Sidecar, law: str) -> None:
    """Its routers are the base model's: so is its memory."""
    base = byte_model().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(base, lora(target_modules=["q_proj", "v_proj"])).eval()
    assert model_fingerprint(adapted) == loaded_model().fingerprint
    plain = generate(adapted)[1]
    assert not torch.equal(plain, generate(loaded_model().model)[1])
    with opened(ram_sidecar, law, adapted, tokenizer=byte_tokenizer()) as memory:
        routed = generate(adapted)[1]
        assert (memory.report.tokens, memory.report.fallbacks) == (TOKENS, {})
        assert memory.learn("Taught to the adapted model.")[0].entries
    assert not torch.equal(routed, plain)
    assert torch.equal(generate(adapted)[1], plain)


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
        lora(target_modules="all-linear"),
        lora(target_modules=["q_proj"], modules_to_save=["gate"]),
        lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
    ],
    ids=["parameter", "all-linear", "gate", "mlp"],
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_an_adapter_on_routers_is_refused(
    ram_sidecar: Sidecar, law: str, config: LoraConfig
) -> None:
    adapted = get_peft_model(byte_model(), config).eval()
    with (
        pytest.raises(UnsupportedModel, match=r"an adapter changes the router .*merge_and_unload"),
        opened(ram_sidecar, law, adapted),
    ):
        pass
    if not config.modules_to_save:
        merged = adapted.merge_and_unload()
        with pytest.raises(ModelMismatch), opened(ram_sidecar, law, merged):
            pass


@WHERE
def test_a_compiled_model(
    ram_sidecar: Sidecar, law: str, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that ran compiled before the memory was opened; the compiler has nothing to warn of."""
    torch.compiler.reset()
    model = byte_model().requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    batch = byte_tokenizer()(PROMPT, return_tensors="pt")

    @torch.no_grad()
    def run(called: Any) -> Tensor:
        return called(**batch).logits

    plain = run(compiled)
    with opened(ram_sidecar, law, model):
        expected = run(model)
    assert not torch.equal(expected, plain)
    tokenizer = byte_tokenizer()
    capfd.readouterr()
    with opened(ram_sidecar, law, compiled, tokenizer=tokenizer, retrieval=where) as memory:
        torch.testing.assert_close(run(compiled), expected, rtol=0, atol=1e-4)
        assert capfd.readouterr().err == ""
        assert memory.report.tokens == len(PROMPT)
        assert memory.learn(f"Taught to the compiled model, {where}.")[0].entries
    torch.testing.assert_close(run(compiled), plain, rtol=0, atol=1e-4)


@WHERE
def test_eight_threads_count_together(ram_sidecar: Sidecar, law: str, where: str) -> None:
    model, rounds = loaded_model().model, 3
    with opened(ram_sidecar, law, retrieval=where) as memory:
        alone = generate(model)[1]

        def work(_: int) -> list[Tensor]:
            return [generate(model)[1] for _ in range(rounds)]

        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(work, range(8)):
                for each in found:
                    torch.testing.assert_close(each, alone, rtol=0, atol=1e-4)
        report = memory.report
    assert report.tokens == (8 * rounds + 1) * TOKENS
    assert {layer.tokens for layer in report.layers} == {report.tokens}
    assert report.lookups == (8 * rounds + 1) * NEW * LAYERS
    assert report.fallbacks == {}


def test_learning_while_threads_generate(ram_sidecar: Sidecar, name: str) -> None:
    """Neither sees the other: entries are those of a quiet model, and every token generated was looked up."""
    loaded, rounds = loaded_model(), 2
    names = {quiet: f"{name}-{quiet}" for quiet in (True, False)}
    for each in names.values():
        build(ram_sidecar.target, each, "recommended", settings=WIDE)
    started = threading.Barrier(4)

    def work(_: int) -> None:
        started.wait()
        for _ in range(rounds):
            generate(loaded.model)

    def teach(memory: RoutingMemory) -> None:
        for sentence in SENTENCES[:rounds]:
            memory.learn(sentence[::-1])

    with opened(ram_sidecar, names[True]) as memory:
        teach(memory)
    with opened(ram_sidecar, names[False]) as memory, ThreadPoolExecutor(3) as pool:
        working = pool.map(work, range(3))
        started.wait()
        teach(memory)
        list(working)
        report = memory.report
    assert report.tokens == 3 * rounds * TOKENS
    assert report.fallbacks == {}
    assert everything(ram_sidecar, names[False]) == everything(ram_sidecar, names[True])
