"""lm-evaluation-harness with a memory: the plain model's answers where there is nothing, better ones, or an error."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from knnmoe.client import AdminClient, MemoryNotFound, ModelMismatch, ServiceUnavailable
from typer.testing import CliRunner

from model_runner import load_model
from model_runner.cli.app import app
from model_runner.errors import BadInput, MemoryChanged
from model_runner.memory_builder.builder import MemoryBuilder, Target
from model_runner.memory_builder.recipes import PRESETS
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import drawn, read_windows
from tests.integration.runner_parts import (
    LAYERS,
    QUIET,
    SENTENCES,
    build,
    loaded_model,
    windows_of,
)
from tests.integration.test_routing_memory import WIDE, footprint
from tests.sidecar import Sidecar, running_sidecar
from tests.tiny_checkpoint import save_checkpoint

pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed, `make test-harness` does it (450 MB)"
)
# Their imports, and their sockets and files at the end of the process.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning")]

FOLDER = Path(__file__).parents[2] / "examples" / "harness"
TASKS = ["shifted_text", "shifted_choice", "shifted_next_word"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Answers = dict[str, list[Any]]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is looked for elsewhere, nothing is left in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def empty(ram_sidecar: Sidecar, name: str) -> str:
    with AdminClient(ram_sidecar.target) as client:
        settings = PRESETS["recommended"].settings(LAYERS)
        client.find_or_create(name, loaded_model().fingerprint.message(), settings)
    return name


def knn_moe(checkpoint: Path, sidecar: Sidecar, memory: Any, **options: Any) -> Any:
    from lm_eval.api.registry import get_model

    import model_runner.harness.model  # noqa: F401

    where = {"memory": memory, "target": sidecar.target} | options
    return get_model("knn-moe")(pretrained=str(checkpoint), device="cpu", batch_size=3, **where)


def answers(lm: Any) -> Answers:
    """Of each kind, in batches with padding."""
    from lm_eval.api.instance import Instance

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        requests = [Instance(kind, {}, each, n, ("task", n, 1)) for n, each in enumerate(arguments)]
        return getattr(lm, kind)(requests, disable_tqdm=True)

    halves = [(sentence[:30], sentence[30:]) for sentence in SENTENCES]
    turns = [[{"role": "user", "content": sentence[:20]}] for sentence in SENTENCES[:4]]
    lm.tokenizer.chat_template = TEMPLATE
    said = [(lm.apply_chat_template(turn), {"max_gen_toks": 6, "until": ["."]}) for turn in turns]
    assert said[0][0] == f"[user] {SENTENCES[0][:20]}\n[assistant]"
    return {
        "loglikelihood": asked("loglikelihood", *halves, *((a, " and") for a, _ in halves)),
        "rolling": asked("loglikelihood_rolling", *((sentence,) for sentence in SENTENCES)),
        "generated": asked("generate_until", *said),
    }


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Answers:
    from lm_eval.models.huggingface import HFLM

    return answers(HFLM(str(checkpoint), device="cpu", batch_size=3))


@pytest.mark.parametrize("where", ["replica", "remote", None])
def test_without_entries_it_is_the_harness_own_model_bit_for_bit(
    ram_sidecar: Sidecar, empty: str, checkpoint: Path, plain: Answers, where: str | None
) -> None:
    options = {} if where is None else {"retrieval": where}
    lm = knn_moe(checkpoint, ram_sidecar, None if where is None else empty, **options)
    assert answers(lm) == plain
    info = lm.get_model_info()
    if where is None:
        assert "memory" not in info
    else:
        assert (info["memory"], info["memory_retrieval"]) == (empty, where)
        assert (info["memory_entries"], info["memory_lambda_mean"]) == (0, 0.0)
        assert info["memory_tokens"] > 100


@pytest.mark.parametrize("where", ["replica", "remote"])
def test_a_memory_makes_what_it_knows_likelier(
    ram_sidecar: Sidecar, name: str, checkpoint: Path, plain: Answers, where: str
) -> None:
    build(ram_sidecar.target, name, "recommended", settings=WIDE)
    lm = knn_moe(checkpoint, ram_sidecar, name, retrieval=where)
    before = footprint(lm.model)
    with_memory = answers(lm)
    assert all(a > b for a, b in zip(with_memory["rolling"], plain["rolling"], strict=True))
    assert footprint(lm.model) == before
    info = lm.get_model_info()
    assert info["memory_entries"] > 0 < info["memory_lambda_mean"] < 1
    assert info["memory_fallbacks"] == 0


def test_a_harness_that_reads_entry_points_finds_it() -> None:
    """lm_eval after 0.4.13 keeps them as placeholders, which its registry of that release resolves already."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry, get_model

    import model_runner.harness.model  # noqa: F401

    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    [(name, where)] = project["entry-points"]["lm_eval.models"].items()
    registry: Any = Registry("model", base_cls=LM)
    registry.register(name, target=EntryPoint(name, where, "lm_eval.models"))
    assert registry.get("knn-moe") is get_model("knn-moe")


def test_what_changes_while_it_scores_ends_it(
    ram_sidecar: Sidecar, empty: str, checkpoint: Path
) -> None:
    lm = knn_moe(checkpoint, ram_sidecar, empty, retrieval="remote")
    answers(lm)
    build(ram_sidecar.target, empty, "recommended", windows=windows_of(SENTENCES[:2]))
    with pytest.raises(MemoryChanged, match=f"memory '{empty}' was changed"):
        answers(lm)


def test_a_sidecar_that_is_gone_ends_it(checkpoint: Path, data: Path) -> None:
    with running_sidecar(data, backend="exact") as sidecar:
        build(sidecar.target, "law", "recommended")
        lm = knn_moe(checkpoint, sidecar, "law")
    with pytest.raises(ServiceUnavailable):
        answers(lm)


def test_what_is_refused_at_once(
    ram_sidecar: Sidecar, empty: str, checkpoint: Path, tmp_path: Path
) -> None:
    from lm_eval.api.model import CachingLM

    with pytest.raises(MemoryNotFound, match="'7'"):  # the harness makes numbers of such names
        knn_moe(checkpoint, ram_sidecar, 7)
    with pytest.raises(ModelMismatch):
        knn_moe(MODEL_DIR, ram_sidecar, empty)
    with pytest.raises(BadInput, match="retrieval: got 'here', expected"):
        knn_moe(checkpoint, ram_sidecar, empty, retrieval="here")
    with pytest.raises(BadInput, match="max_staleness_s: got 'soon', expected seconds from 0 on"):
        knn_moe(checkpoint, ram_sidecar, empty, max_staleness_s="soon")
    with pytest.raises(BadInput, match="use_cache: its answers"):
        CachingLM(knn_moe(checkpoint, ram_sidecar, empty), str(tmp_path / "answers.db"))
    CachingLM(knn_moe(checkpoint, ram_sidecar, None), str(tmp_path / "answers.db"))


def test_local_tasks_are_scored_better_with_a_memory(
    ram_sidecar: Sidecar, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain model, an empty memory, and by the command one of other chapters of the same book."""
    loaded, chosen = load_model(str(MODEL_DIR), device="cpu"), PRESETS["recommended"]
    windows = drawn(read_windows(data_file("shifted", "dev"), loaded.tokenizer, 128), 8)
    with AdminClient(ram_sidecar.target) as client:
        settings = chosen.settings(loaded.fingerprint.num_layers)
        for each in (name, f"{name}-empty"):
            client.find_or_create(each, loaded.fingerprint.message(), settings)
        builder = MemoryBuilder(loaded.model, loaded.fingerprint, client, batch_size=8)
        builder.build(windows, [Target(name, chosen.recipe, measure_gain=False)], QUIET)
        client.calibrate(name, lambda0=chosen.lambda0)
    plain = evaluated("hf", {"pretrained": str(MODEL_DIR), "device": "cpu"})
    where = {"target": ram_sidecar.target, "memory": f"{name}-empty"}
    assert evaluated("knn-moe", where)["results"] == plain["results"]
    memory = by_command(tmp_path, f"target={ram_sidecar.target},memory={name}", monkeypatch)
    loss = [each["results"]["shifted_text"]["bits_per_byte,none"] for each in (plain, memory)]
    assert loss[0] - loss[1] > 0.01
    assert memory["results"]["shifted_next_word"]["acc,none"] in (0, 1)
    info = memory["config"]
    assert (info["memory"], info["memory_fallbacks"]) == (name, 0)
    assert info["memory_entries"] > 3_000


def evaluated(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import model_runner.harness.model  # noqa: F401

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    options = {"limit": 1, "batch_size": 8, "task_manager": manager}
    found: dict[str, Any] = lm_eval.simple_evaluate(model, arguments, tasks=TASKS, **options)
    return found


def by_command(out: Path, arguments: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As a user runs it, but for the index of the harness's own tasks, which takes seconds."""
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    words = ["lm-eval", "--model", "knn-moe", "--model_args", arguments, "--batch_size", "8"]
    words += ["--tasks", ",".join(TASKS), "--limit", "1", "--include_path", str(FOLDER)]
    done = CliRunner().invoke(app, [*words, "--output_path", str(out)])
    assert done.exit_code == 0, done.output
    assert "|shifted_text " in done.output
    [file] = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found
