"""`model-runner` as a newcomer meets it: what works, and what every mistake says."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from knnmoe.client import AdminClient
from knnmoe.v1.types_pb2 import SIMILARITY_COSINE, MemorySettings
from safetensors.torch import load_file, save_file

from model_runner.texts import read_windows
from tests.integration.command_runs import Run, in_process
from tests.integration.runner_parts import (
    FILE_NAME,
    LAYERS,
    LENGTH,
    PRESET_NAMES,
    PROMPT,
    SENTENCES,
    build,
    everything,
    loaded_model,
    stored,
    windows_of,
    write_text,
)
from tests.message_gate import MessageGate
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

NOBODY = "127.0.0.1:1"
HELD_OUT = ("Know ye not that ye are the temple?", "Let not your heart be troubled.")
PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `model-runner` in this process."""
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `loaded_model`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with reference and held-out text."""
    directory = tmp_path_factory.mktemp("texts")
    write_text(directory / FILE_NAME)
    write_text(directory / "held-out.jsonl", HELD_OUT)
    return directory


@pytest.fixture
def built(edge_sidecar: Sidecar, name: str) -> str:
    """A memory of the first windows."""
    build(edge_sidecar.target, name, windows=[w for w in windows_of() if w.offset == 0])
    return name


@pytest.fixture
def build_arguments(edge_sidecar: Sidecar, texts: Path, model: Path, name: str) -> list[object]:
    """A build that works."""
    return [
        *("build", "--reference", texts / FILE_NAME, "--memory", name, "--model", model),
        *("--target", edge_sidecar.target, "--window", LENGTH, "--batch-size", 4),
        *("--general-windows", 0),
    ]


@PRESET
def test_build_evaluate_generate(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    texts: Path,
    model: Path,
    name: str,
    preset: str,
    tmp_path: Path,
) -> None:
    where = ("--memory", name, "--target", edge_sidecar.target, "--model", model)
    first = run(*build_arguments, "--preset", preset, "--calibrate-on", texts / "held-out.jsonl")
    assert first.code == 0
    assert "0 of 24 windows were there already" in first.err
    phases = (
        "reading",
        "lengths of gradients",
        "building",
        "indexing",
        "router inputs",
        "calibrating",
    )
    assert [
        bool(re.search(rf"^{phase}: \d+ \w+ in \d+ s$", first.err, re.M)) for phase in phases
    ] == [True] * len(phases)
    assert "calibrated, gamma per layer: " in first.err
    again = run(*build_arguments, "--preset", preset)
    assert again.code == 0
    assert "wrote 0 entries per layer" in again.err
    assert "24 of 24 windows were there already" in again.err

    scores = tmp_path / "scores.json"
    shown = run("evaluate", "--text", texts / "held-out.jsonl", *where, "--json", scores)
    assert shown.code == 0
    result = json.loads(scores.read_text())
    plain, routed = result["zero_shot"], result["knn_moe"]
    assert routed["delta"] == pytest.approx(routed["nll"] - plain["nll"])
    assert routed["perplexity"] == pytest.approx(math.exp(routed["nll"]))
    assert routed["bootstrap_95"][0] <= routed["delta"] <= routed["bootstrap_95"][1]
    assert all(0 < lambdas < 1 for lambdas in routed["lambda_mean"])
    assert result["windows"] == len(HELD_OUT)
    for number in (f"{plain['nll']:.4f}", f"{routed['nll']:.4f}", f"{routed['delta']:+.4f}"):
        assert number in shown.out

    text = run("generate", "--prompt", PROMPT, *where, "--max-new-tokens", 4, "--timeout-s", 30)
    assert text.code == 0
    assert text.out.startswith(PROMPT)
    assert f"; lookups that fell back: none of {4 * LAYERS}\n" in text.err
    assert text.err.endswith(f"none of {4 * LAYERS}\n")


def test_calibrate(run: Run, edge_sidecar: Sidecar, built: str, texts: Path, model: Path) -> None:
    where = ("--memory", built, "--target", edge_sidecar.target)
    gamma = gamma_of(edge_sidecar, built)
    dry = run("calibrate", *where, "--dry-run")
    assert dry.code == 0
    assert gamma_of(edge_sidecar, built) == gamma
    inside = run("calibrate", *where)
    assert inside.out == dry.out
    found = gamma_of(edge_sidecar, built)
    assert all(f"{value:.4g}" in inside.out for value in found)
    on_text = run("calibrate", *where, "--text", texts / "held-out.jsonl", "--model", model)
    assert on_text.code == 0
    assert gamma_of(edge_sidecar, built) != found


def test_boosted_and_read_under_a_bound_on_harm(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    name: str,
    texts: Path,
    model: Path,
) -> None:
    first = run(*build_arguments, "--preset", "boosted", "--rounds", 1, "--max-windows", 12)
    assert first.code == 0, first.err
    assert f"{name}: 1 rounds kept (" in first.err
    again = run(*build_arguments, "--preset", "boosted", "--rounds", 1, "--max-windows", 12)
    assert "not calibrated anew: it was boosted" in again.err
    assert "1 rounds kept (as many as asked for, before this run)" in again.err
    where = ("--memory", name, "--target", edge_sidecar.target, "--model", model)
    control = ("--general", texts / "held-out.jsonl", "--max-windows", 8, "--text")
    before = settings_of(edge_sidecar, name)
    without = run("calibrate", *where, "--general", texts / "held-out.jsonl")
    assert without.code == 2
    assert "--general: the gain needs --text" in without.err
    reference = (texts / FILE_NAME, "--leave-one-out", "--window", LENGTH)
    dry = run("calibrate", *where, *control, *reference, "--harm", 9, "--dry-run")
    assert settings_of(edge_sidecar, name) == before
    chosen = run("calibrate", *where, *control, *reference, "--harm", 9)
    assert chosen.code == 0
    assert chosen.out == dry.out
    [row] = [line.split("│")[1:-1] for line in chosen.out.splitlines() if "chosen" in line]
    now = settings_of(edge_sidecar, name)
    assert now.null_weight == float(row[2])
    assert now != before


def settings_of(sidecar: Sidecar, memory: str) -> MemorySettings:
    with AdminClient(sidecar.target) as client:
        return client.describe(memory).settings


def gamma_of(sidecar: Sidecar, memory: str) -> list[float]:
    with AdminClient(sidecar.target) as client:
        return list(client.describe(memory).settings.gamma)


def test_leave_one_out_on_the_reference(
    run: Run,
    edge_sidecar: Sidecar,
    built: str,
    texts: Path,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lambdas, warned = [], []
    for flags in ([], ["--leave-one-out"]):
        done = run(
            *("evaluate", "--text", texts / FILE_NAME, "--memory", built, "--model", model),
            *("--target", edge_sidecar.target, "--window", LENGTH, "--max-windows", 5),
            *("--json", tmp_path / "scores.json", *flags),
        )
        assert done.code == 0
        lambdas.append(json.loads((tmp_path / "scores.json").read_text())["knn_moe"]["lambda_mean"])
        warned.append("scored tokens (entries of a file named reference.jsonl)" in caplog.text)
        caplog.clear()
    assert all(near > far for near, far in zip(*lambdas, strict=True))
    assert warned == [True, False]


def test_one_example_has_no_interval(
    run: Run, edge_sidecar: Sidecar, built: str, model: Path, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "one.jsonl", HELD_OUT[:1])
    done = run(
        *("evaluate", "--text", text, "--memory", built, "--model", model),
        *("--target", edge_sidecar.target, "--json", tmp_path / "scores.json"),
    )
    assert done.code == 0
    assert "needs two examples" in done.out
    result = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert result["knn_moe"]["se"] is None


def test_a_sidecar_that_is_not_there(run: Run, texts: Path, model: Path) -> None:
    for command in (
        ("build", "--reference", texts / FILE_NAME, "--model", model),
        ("evaluate", "--text", texts / FILE_NAME, "--model", model),
        ("calibrate",),
    ):
        done = run(*command, "--memory", "law", "--target", NOBODY)
        assert done.code == 3
        assert f"sidecar at {NOBODY}" in done.err
        assert "Start one with: router-service serve" in done.err
        assert "Loading" not in done.err


def test_generation_needs_no_sidecar(run: Run, model: Path) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--model", model, "--max-new-tokens", 4)
    plain = run(*arguments)
    without = run(*arguments, "--memory", "law", "--target", NOBODY)
    assert (plain.code, without.code) == (0, 0)
    assert without.out == plain.out
    assert "mean lambda per layer: 0.00 0.00 0.00 0.00" in without.err
    made = 4 * LAYERS
    last = rf"; lookups that fell back: {made} of {made} \(\d+ breaker_open, \d+ unavailable\)\n$"
    assert re.search(last, without.err)


def test_generation_that_is_to_stop_without_a_sidecar(run: Run, model: Path) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--model", model, "--memory", "law")
    done = run(*arguments, "--target", NOBODY, "--on-error", "raise")
    assert (done.code, done.out) == (3, "")
    assert f"model-runner: sidecar at {NOBODY}: UNAVAILABLE" in done.err
    other = run(*arguments, "--on-error", "ignore")
    assert other.code == 2
    words = " ".join(other.err.replace("│", " ").split())
    assert "'ignore' is not one of 'fall_back', 'raise'" in words


class Typed:
    """Lines of stdin; acts before one of them."""

    def __init__(self, *lines: str, before: dict[int, Callable[[], object]]) -> None:
        self._lines, self._before = lines, before

    def isatty(self) -> bool:
        return False

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._lines):
            self._before.get(number, lambda: None)()
            yield line + "\n"


@pytest.mark.parametrize("on_error", ["fall_back", "raise"])
def test_a_memory_that_is_deleted_during_a_session(
    run: Run,
    edge_sidecar: Sidecar,
    built: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_error: str,
) -> None:
    """The text goes on as the plain model's or stops, as asked; the session goes on either way."""

    def delete() -> None:
        with AdminClient(edge_sidecar.target) as client:
            client.delete(built)

    def again() -> None:
        build(edge_sidecar.target, built, windows=[w for w in windows_of() if w.offset == 0])

    lines = (PROMPT, PROMPT, "/learn the meek", HELD_OUT[0])
    monkeypatch.setattr(sys, "stdin", Typed(*lines, before={1: delete, 3: again}))
    arguments = ("--model", model, "--max-new-tokens", 4)
    done = run(
        *("generate", "--interactive", "--memory", built, "--target", edge_sidecar.target),
        *("--timeout-s", 30, "--on-error", on_error, "--retrieval", "remote", *arguments),
    )
    assert done.code == 0
    assert done.err.count(f"model-runner: memory '{built}' not found") == (
        1 if on_error == "fall_back" else 2
    )
    if on_error == "fall_back":
        plain = run("generate", "--prompt", PROMPT, *arguments).out
        assert plain in done.out
        assert f"router stands: memory '{built}' not found" in caplog.text
    fell_back = done.err.rpartition("lookups that fell back: ")[2]
    total = 12 * LAYERS if on_error == "fall_back" else 8 * LAYERS
    expected = rf"\d+ of {total} \((\d+ breaker_open, )?\d+ memory_not_found\)\n"
    assert re.fullmatch(expected if on_error == "fall_back" else f"none of {total}\n", fell_back)


@pytest.fixture
def broken_model(tmp_path: Path) -> Path:
    """Gives NaN after the byte "t", which is in every text of these tests, and not when it is loaded."""
    directory = save_checkpoint(tmp_path / "nan")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][loaded_model().tokenizer("t")["input_ids"][0]] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_gives_nan_is_named(
    run: Run,
    edge_sidecar: Sidecar,
    built: str,
    texts: Path,
    broken_model: Path,
    temperature: float,
) -> None:
    """Rather than the sampler's words, a text of the first token over and over, or a table of nan."""
    where = ("--memory", built, "--target", edge_sidecar.target)
    culprit = "first in model.embed_tokens; NaN is in its weights model.embed_tokens.weight: load a checkpoint"
    generate = ("generate", "--prompt", PROMPT, "--temperature", temperature)
    evaluate = ("evaluate", "--text", texts / "held-out.jsonl", *where)
    for command in (generate, (*generate, *where), evaluate):
        done = run(*command, "--model", broken_model)
        assert done.code == 1
        assert "model-runner: the model gives NaN for " in done.err
        assert culprit in done.err


def test_a_model_that_always_gives_nan(run: Run, texts: Path, tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "nan")
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][200] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    done = run("generate", "--prompt", PROMPT, "--model", directory)
    assert (done.code, done.out) == (1, "")
    assert "the model gives NaN for a few token ids, first in lm_head; NaN is in its" in done.err


def test_generation_with_a_memory_that_is_not_there(
    run: Run, edge_sidecar: Sidecar, model: Path
) -> None:
    done = run(
        *("generate", "--prompt", PROMPT, "--model", model),
        *("--memory", "lwa", "--target", edge_sidecar.target),
    )
    assert done.code == 1
    assert "memory 'lwa' not found; this service has: " in done.err
    assert done.out == ""


def test_evaluation_with_a_memory_that_is_not_there(
    run: Run, edge_sidecar: Sidecar, texts: Path, model: Path
) -> None:
    done = run(
        *("evaluate", "--text", texts / FILE_NAME, "--model", model),
        *("--memory", "lwa", "--target", edge_sidecar.target),
    )
    assert done.code == 1
    assert "memory 'lwa' not found; this service has: " in done.err
    assert "plain model" not in done.err


def test_another_models_memory(
    run: Run, edge_sidecar: Sidecar, built: str, texts: Path, tmp_path: Path
) -> None:
    other = save_checkpoint(tmp_path / "other", num_experts_per_tok=3)
    where = ("--memory", built, "--target", edge_sidecar.target, "--model", other)
    for command in (
        ("build", "--reference", texts / FILE_NAME),
        ("evaluate", "--text", texts / FILE_NAME),
        ("generate", "--prompt", PROMPT),
    ):
        done = run(*command, *where)
        assert done.code == 1
        assert f"memory '{built}' was made for another model (top_k: memory 2, " in done.err
        assert done.out == ""


@pytest.mark.parametrize("prompt", ["", "-"])
def test_an_empty_prompt(
    run: Run, model: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    done = run("generate", "--prompt", prompt, "--model", model)
    assert (done.code, done.out) == (2, "")
    assert "--prompt: got no tokens, expected some text" in done.err


def test_a_prompt_on_stdin(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    done = run("generate", "--prompt", "-", "--model", model, "--max-new-tokens", 2)
    assert done.code == 0
    assert done.out.startswith(PROMPT)


def test_sampling_is_seeded(run: Run, model: Path) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--model", model, "--temperature", 1.0)
    texts = [run(*arguments, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--reference", "/nowhere.jsonl"], "'/nowhere.jsonl' does not exist"),
        (["--reference", "/"], "'/' is a directory"),
        (["--calibrate-on", "/nowhere.jsonl"], "'/nowhere.jsonl' does not exist"),
        (["--model", "/nowhere"], "model '/nowhere' cannot be loaded: there is no such directory"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--dtype", "int4"], "dtype: got 'int4', expected auto, float32"),
        (["--window", 4096], "window: got 4096 tokens, expected at most the model's 128"),
        (["--norm", "huge"], "'huge' is not one of 'raw', 'unit', 'soft'"),
        (
            ["--preset", "best"],
            "'best' is not one of 'paper', 'paper-v2', 'recommended', 'boosted'",
        ),
        (["--lambda0", 1.5], "1.5 is not between 0 and 1"),
        (["--steps", 3], "not logit deltas: use steps 1"),
        (["--preset", "paper", "--rounds", 1], "preset paper stores no logit deltas"),
    ],
)
def test_a_wrong_option_of_a_build(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    name: str,
    changes: list[object],
    message: str,
) -> None:
    done = run(*build_arguments, *changes)
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", " ").split())
    with AdminClient(edge_sidecar.target) as client:
        assert client.find(name) is None or client.count(name) == 0


@pytest.mark.parametrize("memory", ["a/b", "..", "", "x" * 300])
def test_a_wrong_name_of_a_memory(run: Run, build_arguments: list[object], memory: str) -> None:
    done = run(*build_arguments, "--memory", memory)
    assert done.code == 1
    assert "name: got " in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b'{"text": "x"}\n', "1 example(s), none with 2 tokens"),
        (b'{"text": "good"}\n{"body": "x"}\n', "row 2: has ['body'], expected `text`"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("option", ["--reference", "--calibrate-on"])
def test_a_wrong_file_is_named_before_anything_is_made(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    name: str,
    tmp_path: Path,
    option: str,
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    done = run(*build_arguments, option, path)
    assert done.code == 2
    assert f"model-runner: {path}: " in done.err
    assert message in done.err
    with AdminClient(edge_sidecar.target) as client:
        assert client.find(name) is None


def test_one_example_cannot_be_calibrated_inside_itself(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    name: str,
    texts: Path,
    tmp_path: Path,
) -> None:
    one = write_text(tmp_path / "one.jsonl", HELD_OUT[:1])
    done = run(*build_arguments, "--reference", one)
    assert done.code == 2
    assert "one example only" in done.err
    assert "give --calibrate-on FILE, or more text" in done.err
    with AdminClient(edge_sidecar.target) as client:
        assert client.find(name) is None
    given = run(*build_arguments, "--reference", one, "--calibrate-on", texts / FILE_NAME)
    assert given.code == 0


def test_few_windows_are_of_many_documents(
    run: Run,
    edge_sidecar: Sidecar,
    build_arguments: list[object],
    name: str,
) -> None:
    one = run(*build_arguments, "--max-windows", 1)
    assert one.code == 2
    assert f"--max-windows 1 leaves one of its {len(SENTENCES)} examples" in one.err
    assert "give --calibrate-on FILE, or --max-windows 2 or more" in one.err
    assert run(*build_arguments, "--max-windows", 4).code == 0
    sources = {provenance.example for _, _, provenance in stored(edge_sidecar, name, 0).values()}
    assert len(sources) == 4


def test_the_model_that_ships_is_the_default_and_named(run: Run) -> None:
    done = run("generate", "--prompt", PROMPT, "--max-new-tokens", 2)
    assert (done.code, done.out[: len(PROMPT)]) == (0, PROMPT)
    assert "model: the small one that ships with this package" in done.err


def test_text_made_from_a_template_is_said_and_calibrated_past_its_copies(
    run: Run, edge_sidecar: Sidecar, build_arguments: list[object], name: str, tmp_path: Path
) -> None:
    forms = write_text(
        tmp_path / "forms.jsonl", [f"The tenant keeps the house for {n} years." for n in range(20)]
    )
    done = run(*build_arguments, "--reference", forms)
    assert done.code == 0
    assert "copies counted as the token's own example" in done.err
    assert f"router-admin prune {name} --near-duplicates 0.98 --dry-run" in done.err
    with AdminClient(edge_sidecar.target) as client:
        gammas = client.describe(name).settings.gamma
        layers = client.calibrate(name, 0.3, dry_run=True).layers
    assert all(2 * layer.copies > layer.queries for layer in layers)
    # The nearest that counts is of another token: far beyond the bound of a copy.
    assert [layer.gamma for layer in layers] == list(gammas)
    assert all(layer.squared_distance > 0.01 * layer.typical_squared_distance for layer in layers)


def test_scores_that_could_not_be_written(
    run: Run, edge_sidecar: Sidecar, built: str, texts: Path, model: Path
) -> None:
    done = run(
        *("evaluate", "--text", texts / FILE_NAME, "--model", model, "--memory", built),
        *("--target", edge_sidecar.target, "--json", "/nowhere/scores.json"),
    )
    assert done.code == 2
    assert "--json: got /nowhere/scores.json, expected a file in a directory" in done.err
    assert "plain model" not in done.err


def test_scores_are_shown_before_they_are_written(
    run: Run, edge_sidecar: Sidecar, built: str, texts: Path, model: Path
) -> None:
    done = run(
        *("evaluate", "--text", texts / "held-out.jsonl", "--model", model, "--memory", built),
        *("--target", edge_sidecar.target, "--json", "/proc/scores.json"),
    )
    assert done.code == 1
    assert "'/proc/scores.json'" in done.err
    assert "with memory" in done.out


def test_a_demo_into_a_file(run: Run, texts: Path) -> None:
    done = run("demo", "--out", texts / FILE_NAME)
    assert done.code == 2
    assert "is a file" in done.err


def test_a_memory_of_the_other_kind(run: Run, build_arguments: list[object], built: str) -> None:
    done = run(*build_arguments, "--memory", built, "--preset", "recommended")
    assert done.code == 2
    assert "holds another kind of values; choose another name" in done.err


def test_a_cosine_memory_has_nothing_to_calibrate(
    run: Run, edge_sidecar: Sidecar, build_arguments: list[object], name: str
) -> None:
    with AdminClient(edge_sidecar.target) as client:
        settings = MemorySettings(preset="paper", similarity=SIMILARITY_COSINE)
        client.find_or_create(name, loaded_model().fingerprint.message(), settings)
    done = run(*build_arguments, "--preset", "paper", "--no-optimize", "--no-gain")
    assert done.code == 0
    assert "a cosine memory has no bandwidth" in done.err


def test_quiet_says_nothing(run: Run, build_arguments: list[object]) -> None:
    done = run(*build_arguments, "--quiet", "--no-optimize", "--max-windows", 4)
    assert done.code == 0
    assert done.out == ""
    assert "building" not in done.err


def test_builds_that_are_interrupted_and_killed(
    run: Run, edge_sidecar: Sidecar, build_arguments: list[object], name: str, texts: Path
) -> None:
    """Ctrl-C, then SIGKILL, then a run to the end: the entries are those of an undisturbed build."""
    windows = read_windows(texts / FILE_NAME, loaded_model().tokenizer, LENGTH)
    build(edge_sidecar.target, f"{name}-whole", "recommended", windows=windows)
    # Its own patience with the upsert that waits for ever must not end it before the signal comes.
    patient = "import knnmoe.client.admin as admin; admin.DEFAULT_TIMEOUT_S = 600.0"
    script = f"import sys, model_runner.cli; {patient}; sys.exit(model_runner.cli.main())"
    arguments = [*map(str, build_arguments), "--batch-size", "1", "--no-optimize"]
    command = [sys.executable, "-c", script, *arguments]

    def disturbed(number: int) -> tuple[int, str]:
        """What is sent to a build of which one upsert waits for ever."""
        with MessageGate(edge_sidecar.target, "Upsert", passes=4 * LAYERS + 1) as gate:
            words = [gate.target if word == edge_sidecar.target else word for word in command]
            with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
                gate.wait_until_stopped(process)
                process.send_signal(number)
                _, err = process.communicate()
        return process.returncode, err

    code, err = disturbed(signal.SIGINT)
    assert code == 130, err
    assert "interrupted; what the sidecar acknowledged is kept" in err
    assert "Traceback" not in err
    some = entries_of(edge_sidecar, name)
    code, _ = disturbed(signal.SIGKILL)
    assert code == -signal.SIGKILL
    whole = entries_of(edge_sidecar, f"{name}-whole")
    assert 0 < some < entries_of(edge_sidecar, name) < whole
    finished = run(*arguments)
    assert finished.code == 0
    assert "; 0 of 24 windows" not in finished.err
    assert_near(everything(edge_sidecar, name), everything(edge_sidecar, f"{name}-whole"))


def entries_of(sidecar: Sidecar, memory: str) -> int:
    with AdminClient(sidecar.target) as client:
        return 0 if client.find(memory) is None else client.count(memory)


def assert_near(one: list[dict], other: list[dict]) -> None:
    """The same ids; keys and values up to the rounding of another batch size."""
    for layer, expected in zip(one, other, strict=True):
        assert layer.keys() == expected.keys()
        for entry, (key, value) in layer.items():
            assert key == pytest.approx(expected[entry][0], abs=1e-4)
            assert value == pytest.approx(expected[entry][1], abs=1e-3)
