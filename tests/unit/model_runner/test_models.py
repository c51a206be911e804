"""Loading models: what comes out, and clear errors for what cannot be loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from model_runner.errors import BadInput, UnsupportedLibrary, UnsupportedModel
from model_runner.fingerprint import model_fingerprint
from model_runner.models import load_model, pick_device, window_length
from tests.families import shared_model, tiny_model
from tests.tiny_checkpoint import byte_model, byte_tokenizer, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no directory is not looked for on the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_frozen_model_in_eval_mode(checkpoint: Path) -> None:
    loaded = load_model(str(checkpoint), device="cpu")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.device == torch.device("cpu")
    assert loaded.fingerprint == model_fingerprint(byte_model())
    assert loaded.tokenizer("añ")["input_ids"] == byte_tokenizer()("añ")["input_ids"]
    assert len(loaded.tokenizer("añ")["input_ids"]) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for(checkpoint: Path, dtype: str) -> None:
    loaded = load_model(str(checkpoint), device="cpu", dtype=dtype)
    assert loaded.model.lm_head.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float", "nn", "", "fp32"])
def test_a_dtype_that_is_none(checkpoint: Path, dtype: str) -> None:
    with pytest.raises(BadInput, match="expected auto, float32, bfloat16, float16"):
        load_model(str(checkpoint), device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "gpu", "", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_cannot_be_used(checkpoint: Path, device: str) -> None:
    with pytest.raises(BadInput, match=f"device '{device}' cannot be used"):
        load_model(str(checkpoint), device=device)


def test_auto_is_a_device_that_works() -> None:
    assert torch.zeros(1, device=pick_device("auto")).device.type == pick_device("auto").type


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "no-such/model", "", "a b"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(BadInput, match="there is no such directory") as caught:
        load_model(name, device="cpu")
    assert f"model {name!r} cannot be loaded" in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """Has no model; counts what it is asked for."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The hub is at this port of this machine."""
    constants, address = "huggingface_hub.constants", f"http://127.0.0.1:{port}"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub without models: what it was asked for."""
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever).start()
        point_at(monkeypatch, server.server_port)
        Hub.asked.clear()
        yield Hub.asked
        server.shutdown()


def test_a_misspelt_name_is_asked_for_once(
    hub: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    expected = (
        "model 'olmo' cannot be loaded: there is no such directory here, nor one of that name at the hub "
        "(a private one needs HF_TOKEN); near it: olmoe"
    )
    with pytest.raises(BadInput, match=f"^{re.escape(expected)}$"):
        load_model("olmo", device="cpu")
    assert hub == ["/olmo/resolve/main/config.json"]


def test_a_misspelt_directory_is_not_asked_for(hub: list[str], checkpoint: Path) -> None:
    with pytest.raises(BadInput, match=f"such directory; near it: {re.escape(str(checkpoint))}$"):
        load_model(str(checkpoint.with_name("OLMo")), device="cpu")
    with pytest.raises(BadInput, match="it is a file, expected its directory"):
        load_model(str(checkpoint / "config.json"), device="cpu")
    assert hub == []


def test_a_hub_that_is_away(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Asked once; what is in its cache is loaded."""
    point_at(monkeypatch, 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--us--olmoe"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, cached / "snapshots" / ("0" * 40))
    assert load_model("us/olmoe", device="cpu").name == "us/olmoe"
    with pytest.raises(BadInput, match=r"the hub cannot be reached \(.*\); near it: us/olmoe$"):
        load_model("us/OLMo", device="cpu")
    assert "Retrying" not in caplog.text


@pytest.mark.parametrize("version", ["4.57.6", "5.16.0", "5.24.0", "6.0.0.dev0"])
def test_a_transformers_outside_of_the_range(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("model_runner.models.version", {"transformers": version}.get)
    expected = f"transformers {version} is not supported, expected >=5.16.1,<5.24: pip install 'transformers>"
    with pytest.raises(UnsupportedLibrary, match=re.escape(expected)):
        load_model(str(checkpoint), device="cpu")


@pytest.mark.parametrize("version", ["5.16.1", "5.20.0.dev0", "5.23.9"])
def test_a_transformers_within_the_range(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("model_runner.models.version", {"transformers": version}.get)
    assert load_model(str(checkpoint), device="cpu").name == str(checkpoint)


def truncated_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def garbage_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"not safetensors at all")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def garbage_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def unknown_model_type(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "perpetuum"}')


def other_widths(path: Path) -> None:
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"num_experts": 8', '"num_experts": 16'))


def no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def garbage_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "break_it",
    [
        truncated_weights,
        garbage_weights,
        no_weights,
        no_config,
        garbage_config,
        unknown_model_type,
        other_widths,
        no_tokenizer,
        garbage_tokenizer,
    ],
)
def test_a_broken_checkpoint_is_named(copy: Path, break_it: Callable[[Path], None]) -> None:
    break_it(copy)
    with pytest.raises(BadInput, match="cannot be loaded: ") as caught:
        load_model(str(copy), device="cpu")
    assert str(copy) in str(caught.value)


def test_a_model_without_experts(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=257, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"GPT2LMHeadModel has no MoE layer.*Mixture"):
        load_model(str(tmp_path), device="cpu")


def test_a_model_that_is_no_causal_lm(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=8).save_pretrained(tmp_path)
    transformers.T5Config(d_model=8).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("asked", "length"), [(None, 128), (2, 2), (128, 128)])
def test_windows_fit_the_model(asked: int | None, length: int) -> None:
    assert window_length(shared_model("olmoe"), asked) == length


def test_windows_of_models_made_for_more() -> None:
    model = tiny_model("olmoe", max_position_embeddings=4096)
    assert window_length(model, None) == 512
    assert window_length(model, 4096) == 4096


def test_a_window_longer_than_the_model_was_made_for() -> None:
    with pytest.raises(BadInput, match="got 129 tokens, expected at most the model's 128"):
        window_length(shared_model("olmoe"), 129)
