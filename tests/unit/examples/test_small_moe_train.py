"""Training: two steps on a tiny text, and the experts computation it uses."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small_moe.families import FAMILIES, new_model
from examples.small_moe.sources import Document
from examples.small_moe.texts import write_jsonl
from examples.small_moe.token_streams import random_windows, spaced_windows, token_stream
from examples.small_moe.train import (
    PEAK_LEARNING_RATE,
    STATE_FILE,
    TrainingPlan,
    learning_rate,
    main,
    mean_nll,
    new_optimizer,
    prepared_streams,
    save_checkpoint,
    train,
    train_step,
)
from model_runner.architectures import find_router_sites

DOCUMENTS = [
    Document(f"d/{n}", f"The {n}th of many short lines about the number {n}.\n" * 10)
    for n in range(40)
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    write_jsonl(DOCUMENTS[4:], directory / "general_train.jsonl")
    write_jsonl(DOCUMENTS[:4], directory / "general_dev.jsonl")
    return directory


@pytest.fixture(scope="module")
def streams_and_tokenizer(texts):
    return prepared_streams(texts)


@pytest.fixture(scope="module")
def out(texts, tmp_path_factory):
    """The checkpoint directory of a run of two steps from the command line."""
    directory = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.small_moe.train.keep_freed_memory", lambda: None)
        command = f"--texts {texts} --out {directory} --seed 0 --steps 2 --threads 1 --device cpu"
        main(command.split())
    return directory


def test_two_steps_leave_a_checkpoint_that_loads(out, streams_and_tokenizer):
    streams, tokenizer = streams_and_tokenizer
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert "lm_head.weight" in load_file(out / "model.safetensors")
    windows = spaced_windows(streams["dev"], 4)
    untrained = mean_nll(new_model(0), windows)
    assert mean_nll(model, windows) < untrained
    assert AutoTokenizer.from_pretrained(out)("lines").input_ids == tokenizer("lines").input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family_load(family, streams_and_tokenizer, tmp_path):
    model = new_model(0, family)
    save_checkpoint(model, streams_and_tokenizer[1], tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.model_type == family
    assert 3.5e6 < loaded.num_parameters() < 4.5e6
    assert [site.top_k for site in find_router_sites(loaded)] == [4] * 4
    written = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, written[name].bfloat16().float())


def test_a_step_learns_in_every_family(streams_and_tokenizer):
    stream = streams_and_tokenizer[0]["train"]
    batch = random_windows(stream, 2, seed=0, step=0)
    for family in FAMILIES:
        model = new_model(0, family)
        optimizer = new_optimizer(model)
        losses = [train_step(model, optimizer, batch, 4e-3) for _ in range(3)]
        assert losses[-1] < losses[0]
        routers = [site.router for site in find_router_sites(model)]
        assert not torch.equal(
            routers[0].weight, find_router_sites(new_model(0, family))[0].router.weight
        )


def test_resuming_after_the_last_step_changes_nothing(out, streams_and_tokenizer):
    saved = torch.load(out / STATE_FILE, weights_only=True)
    plan = TrainingPlan(seed=1, steps=2, out=out, device="cpu")
    resumed = train(plan, *streams_and_tokenizer, resume=True).state_dict()
    assert saved["step"] == 2
    assert all(torch.equal(resumed[name], value) for name, value in saved["model"].items())


def test_same_seed_same_weights_and_batches():
    first, second, other = new_model(1), new_model(1), new_model(2)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_learning_rate_warms_up_and_decays():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(PEAK_LEARNING_RATE, rel=0.02)
    assert rates[0] < rates[30] < rates[59]
    assert rates[999] == pytest.approx(0.05 * PEAK_LEARNING_RATE, rel=0.01)


def test_windows_are_cut_from_the_stream(streams_and_tokenizer):
    streams, tokenizer = streams_and_tokenizer
    stream = token_stream([document.text for document in DOCUMENTS], tokenizer)
    assert int(stream[-1]) == tokenizer.eos_token_id
    batch = random_windows(stream, 3, seed=0, step=5)
    assert batch.shape == (3, 128)
    assert torch.equal(batch, random_windows(stream, 3, seed=0, step=5))
    assert not torch.equal(batch, random_windows(stream, 3, seed=0, step=6))
    assert len(spaced_windows(stream, 10**6)) == len(stream) // 128
    assert len(spaced_windows(streams["train"], 2)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_experts_compute_what_eager_experts_do(family):
    model = new_model(0, family)
    tokens = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    results = {}
    for implementation in (model.config._experts_implementation, "eager"):
        model.config._experts_implementation = implementation
        model.zero_grad()
        logits = model(input_ids=tokens).logits
        logits.square().mean().backward()
        experts = model.model.layers[1].mlp.experts
        results[implementation] = (logits.detach(), experts.gate_up_proj.grad.clone())
    (fast, fast_gradient), (plain, plain_gradient) = results.values()
    assert float((fast - plain).norm() / plain.norm()) < 0.02
    assert float((fast_gradient - plain_gradient).norm() / plain_gradient.norm()) < 0.02
