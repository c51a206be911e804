"""What a memory costs inside vLLM: `python -m benchmarks.vllm --json FILE`, in the environment of `make test-vllm`.

Decoded tokens a second of the shipped model and of a random OLMoE, without a memory and with one, in a replica and in
the sidecar, at batches of 1 and 16. Both take turns in one engine, on the same prompts; what is said is the median of
the paired ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from knnmoe.client import AdminClient
from knnmoe.v1.types_pb2 import MemorySettings
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import report
from benchmarks.olmoe import MEMORY, Shape, fill, make_entries, make_model, zipf_tokens
from model_runner.sidecar import running_sidecar
from model_runner.small_moe import MODEL_DIR
from tests.vllm.ask import engine

# Of the shipped model, and of a random one.
SHAPES = {
    "shipped": Shape(4, 128, 16, 4, 128, 4, 4096, keys=7_600),
    "random": Shape(8, 512, 64, 8, 256, 8, 4096, keys=20_000),
}
PROMPT, NEW_TOKENS = 32, 64
BATCHES = (1, 16)
NEIGHBOURS = 32
PLAIN, REMEMBERED = "plain tokens/s", "memory tokens/s"
# A replica measures its first pass on the tokens of its first lookups.
WARM_UP = 4


def main(
    rounds: Annotated[int, typer.Option(help="Pairs of each arm.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help="shipped, random; both by default.")
    ] = None,
    retrievals: Annotated[list[str] | None, typer.Option(help="replica, remote; both.")] = None,
    keys: Annotated[int | None, typer.Option(help="Entries a layer.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the results are written.")
    ] = None,
) -> None:
    """Prints a table: a row for each model, retrieval and batch."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    rows: list[dict[str, Any]] = []
    load = report.load_average()
    for name in only or SHAPES:
        with tempfile.TemporaryDirectory() as directory:
            where = retrievals or ["replica", "remote"]
            rows += _measured(name, Path(directory), rounds, where, keys)
    Console(width=report.TABLE_WIDTH).print(_table(rows))
    if json_file is not None:
        settings = {"rounds": rounds, "neighbours": NEIGHBOURS, "new_tokens": NEW_TOKENS}
        shapes = {name: asdict(SHAPES[name]) for name in only or SHAPES}
        made = report.document("vllm", settings | shapes, rows, {}, load)
        json_file.write_text(json.dumps(made, indent=1))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(title="Decoded tokens a second inside vLLM, medians of pairs", box=box.SIMPLE)
    columns = ("model", "retrieval", "batch", PLAIN, REMEMBERED, "ratio", "fell_back")
    for column in columns:
        made.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in rows:
        made.add_row(*(str(row[column] or "") for column in columns))
    return made


def _measured(
    name: str, directory: Path, rounds: int, retrievals: list[str], keys: int | None
) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name] if keys is None else replace(SHAPES[name], keys=keys)
    model = _model(name, shape)
    model.save_pretrained(directory / "model")  # type: ignore[operator]
    with running_sidecar(directory / "data", directory / "log") as target:
        fill(target, model, make_entries(model, shape, None))
        with AdminClient(target) as admin:
            admin.update_settings(MEMORY, MemorySettings(neighbours=NEIGHBOURS))
        for retrieval in retrievals:
            config = {
                "target": target,
                "memories": [MEMORY],
                "retrieval": retrieval,
                "timeout_s": 10,
            }
            with engine(directory / "model", config, max_num_seqs=max(BATCHES)) as llm:
                for batch in BATCHES:
                    yield {"model": name, "retrieval": retrieval} | _paired(
                        llm, shape, batch, rounds
                    )


def _model(name: str, shape: Shape) -> nn.Module:
    """With output weights of its own, which are then saved: vLLM's OLMoE does not tie them."""
    if name == "shipped":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()
    else:
        model = make_model(shape)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    return model


def _paired(llm: Any, shape: Shape, batch: int, rounds: int) -> dict[str, Any]:
    """Tokens a second without and with the memory, in turn, after WARM_UP pairs."""
    plain, remembered = [], []
    for number in range(WARM_UP + rounds):
        texts = zipf_tokens(shape, batch, PROMPT, number).tolist()
        plain.append(_tokens_per_s(llm, texts, None))
        remembered.append(_tokens_per_s(llm, texts, MEMORY))
    [status] = llm.collective_rpc("knn_moe_status")
    ratios = [
        with_ / without
        for with_, without in zip(remembered[WARM_UP:], plain[WARM_UP:], strict=True)
    ]
    return {
        "batch": batch,
        PLAIN: round(statistics.median(plain[WARM_UP:]), 1),
        REMEMBERED: round(statistics.median(remembered[WARM_UP:]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "fell_back": status["memories"][MEMORY]["fell_back"],
    }


def _tokens_per_s(llm: Any, texts: list[list[int]], memory: str | None) -> float:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"knn_moe": {"memory": memory}},
    )
    inputs = [{"prompt_token_ids": text} for text in texts]
    started = time.perf_counter()
    llm.generate(inputs, params, use_tqdm=False)
    return len(texts) * NEW_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    typer.run(main)
