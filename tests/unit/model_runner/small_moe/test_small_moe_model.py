"""The shipped checkpoint: loads offline, knows the general text, does not know the shifted one."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small_moe.token_streams import END_OF_TEXT, spaced_windows, stream_of
from examples.small_moe.train import mean_nll
from model_runner.small_moe import MODEL_DIR, data_file
from tests.rounding import assert_same_sums

WINDOWS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, local_files_only=True
    )


@pytest.fixture(scope="module")
def nll(model, tokenizer):
    return {
        domain: mean_nll(
            model, spaced_windows(stream_of(data_file(domain, "test"), tokenizer), WINDOWS)
        )
        for domain in ("general", "shifted")
    }


def test_checkpoint_is_a_small_mixture_of_experts(model):
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (16, 4)
    assert config.num_hidden_layers == 4
    assert not config.norm_topk_prob
    assert 3.5e6 < model.num_parameters() < 4.5e6


def test_checkpoint_stays_small():
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 16 * 2**20


def test_checkpoint_holds_the_weights_that_its_embedding_shares():
    # vLLM's OLMoE does not tie them
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as checkpoint:
        embedding = checkpoint.get_tensor("model.embed_tokens.weight")
        assert torch.equal(checkpoint.get_tensor("lm_head.weight"), embedding)


def test_tokenizer_round_trips_any_text(tokenizer):
    text = "And the LORD spake unto Moses:\n  x = {'a': 1}  # ü €\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) == 4096


def test_general_text_is_learnt(nll):
    assert nll["general"] < 4.5


def test_shifted_text_is_harder(nll):
    assert nll["shifted"] > nll["general"] + 0.3


def test_experts_implementations_agree(model, tokenizer):
    tokens = tokenizer("The function returns", return_tensors="pt").input_ids
    with torch.no_grad():
        default = model(input_ids=tokens).logits
        eager = AutoModelForCausalLM.from_pretrained(
            MODEL_DIR, dtype=torch.float32, experts_implementation="eager", local_files_only=True
        )(input_ids=tokens).logits
    config = model.config
    longest = max(config.hidden_size, config.intermediate_size)
    assert_same_sums(default, eager, length=longest, layers=config.num_hidden_layers)


def test_checkpoint_generates(model, tokenizer):
    tokens = tokenizer("SELECT", return_tensors="pt").input_ids
    grown = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert grown.shape[1] <= tokens.shape[1] + 4
