"""docs/scaling.md holds what benchmarks.scaling prints; its arithmetic by hand; its measurements at toy size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, OlmoeConfig, Qwen3MoeConfig

from benchmarks import scaling
from benchmarks.scaling_grid import (
    END,
    Column,
    Grid,
    amount,
    count,
    decimal,
    placed,
    with_grids,
)
from benchmarks.scaling_load import (
    Load,
    added_ms,
    default_graphs,
    demand,
    processor_ms,
    search_cores,
)
from benchmarks.scaling_measure import Plan, Shards, measurements
from benchmarks.scaling_sizes import (
    GIB,
    MODELS,
    WEIGHTS,
    Measured,
    Model,
    entry_size,
    examples_embedded,
    held_entry,
    held_in_ram,
    held_on_gpu,
    line,
    memory_size,
    nodes,
    nodes_by_cores,
    qdrant_rule,
    shards_per_layer,
    value_floats,
)
from model_runner.progress import Progress
from router_service.memories.settings import Kind
from tests.engines import SERVERS, url_of

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"
TOY = Model("toy", layers=3, dimension=2048, experts=10, top_k=2)


def keys(entries: int, method: str, codes: float, graph: float, ms: float) -> dict[str, Any]:
    batches = [{"tokens": 4, "processor_ms_per_query": ms}]
    sizes = {"codes_bytes": codes, "graph_bytes": graph}
    return {"dimension": 2048, "entries": entries, "method": method, "batches": batches, **sizes}


@pytest.fixture
def measured() -> Measured:
    payload = {"payload_bytes": 100.0, "payload_index_bytes": 7.0, "ids_bytes": 3.0}
    query = {"request_bytes": 50, "response_bytes": 20, "request_us": 10, "response_us": 90}
    return Measured(
        {
            "keys": [
                keys(10_000, "int8", 2000.0, 40.0, 1.0),
                keys(1_000, "int8", 2001.0, 30.0, 0.5),
                keys(100_000, "int8", 2000.0, 50.0, 1.5),
                keys(1_000, "int8", 2884.0, 30.0, 0.6) | {"dimension": 2880},
                keys(1_000, "none", 0.0, 20.0, 2.0),
            ],
            "payloads": [{"value_floats": 10, **payload}],
            "pinned": [
                {"indexes": "ram", "bytes_per_entry": 200.0},
                {"indexes": "embedded", "bytes_per_entry": 300.0},
            ],
            "value_tables": [{"value_floats": 10, "opened_bytes": 60.0}],
            "queries": [{"dimension": 2048, "value_floats": 10, **query}],
            "routes": [{"dimension": 2048, "experts": 10, "request_bytes": 5, "response_bytes": 1}],
        }
    )


def test_the_page_holds_what_the_program_prints() -> None:
    page, grids = PAGE.read_text(), scaling.grids()
    assert page.count(END) == len(grids)
    for grid in grids:
        assert placed(grid) in page, "run `python -m benchmarks.scaling --page docs/scaling.md`"


def test_numbers_have_names_of_their_own() -> None:
    for grid in scaling.grids():
        titles = [column.title for column in grid.columns]
        assert len(set(titles)) == len(titles), grid.name


def test_models_are_those_of_transformers() -> None:
    """Its defaults are OLMoE-1B-7B, GPT-OSS-120B, and Qwen3-30B-A3B but for the number of layers."""
    shapes = {model.name: model for model in MODELS}
    olmoe, gpt_oss, qwen = OlmoeConfig(), GptOssConfig(), Qwen3MoeConfig()
    for model, config in ((shapes["OLMoE-1B-7B"], olmoe), (shapes["GPT-OSS-120B"], gpt_oss)):
        assert model.layers == config.num_hidden_layers
    for name, config in (
        ("OLMoE-1B-7B", olmoe),
        ("GPT-OSS-120B", gpt_oss),
        ("Qwen3-30B-A3B", qwen),
    ):
        model, experts = shapes[name], getattr(config, "num_local_experts", None)
        assert model.dimension == config.hidden_size
        assert model.experts == (experts or config.num_experts)
        assert model.top_k == config.num_experts_per_tok


def test_an_entry_is_the_sum_of_its_parts(measured: Measured) -> None:
    size = entry_size(measured, TOY, "int8", 10_000)
    assert size.disk == 4 * 2048 + 2000 + 40 + 100 + 7 + 3
    assert size.ram == 2000 + 40 + 200  # the key stays on disk
    assert entry_size(measured, TOY, "none", 1_000).ram == 4 * 2048 + 20 + 200


def test_figures_grow_along_a_line_in_the_logarithm() -> None:
    points = [(1_000, 4.0), (10_000, 6.0), (100_000, 8.0)]
    found = [line(points, entries) for entries in (1, 1_000, 10_000, 1_000_000)]
    assert found == pytest.approx([4, 4, 6, 10])
    assert line([(1_000, 3.0), (10_000, 6.0), (100_000, 3.0)], 10_000) == pytest.approx(4)


def test_links_of_every_method_grow_as_those_of_int8(measured: Measured) -> None:
    assert measured.graph(2048, "int8", 1_000) == 30
    assert measured.graph(2048, "int8", 1_000_000) == pytest.approx(60)
    assert measured.graph(2048, "none", 1_000_000) == pytest.approx(20 * 60 / 30)


def test_values_are_deltas_or_experts_with_weights() -> None:
    assert value_floats(TOY, Kind.LOGIT_DELTA) == 10
    assert value_floats(TOY, Kind.ASSIGNMENT) == 4


def test_a_memory_is_layers_times_entries(measured: Measured) -> None:
    size = memory_size(measured, TOY, "int8", 10_000)
    assert (size.entries, size.ram) == (30_000, 30_000 * 2240)
    assert memory_size(measured, TOY, "int8", 10_000, layers=1).entries == 10_000
    assert qdrant_rule(TOY, 100) == 3 * 100 * 2048 * 4 * 1.5


@pytest.mark.parametrize(("copies_gib", "expected"), [(1, 3), (72, 3), (73, 4), (2400, 100)])
def test_nodes_hold_two_copies_in_three_quarters_of_their_ram(
    copies_gib: int, expected: int
) -> None:
    assert nodes(copies_gib / 2 * GIB, 32) == expected


def test_shards_leave_every_node_four_replicas_or_more() -> None:
    assert [shards_per_layer(number, 16) for number in (3, 8, 9, 80)] == [1, 1, 2, 10]
    assert 2 * 16 * shards_per_layer(80, 16) / 80 == 4


def test_what_one_machine_holds_fills_its_ram(measured: Measured) -> None:
    examples = examples_embedded(measured, TOY, "int8", 64)
    each = measured.graph(2048, "int8", examples * 128) + 2000 + 300 + 60
    assert examples * 128 * 3 * each == pytest.approx(0.75 * 64 * GIB, rel=1e-4)


def test_a_model_holds_what_its_weights_leave_of_a_gpu() -> None:
    olmoe, qwen = (model for model in MODELS if model.name in WEIGHTS)
    each = 2 * 2048 + 4 * 64 + 8
    assert held_entry(olmoe, 2) == each
    assert held_on_gpu(olmoe, 2) == int((0.8 * 80e9 - 13.8e9) / (16 * each))
    assert held_in_ram(olmoe, 2, 64) == int(0.75 * 64 * GIB / (16 * each))
    assert held_on_gpu(qwen, 4) * 48 * held_entry(qwen, 4) <= 0.8 * 80e9 - 61.1e9


def test_nodes_search_with_three_quarters_of_their_cores() -> None:
    assert [nodes_by_cores(cores) for cores in (0.1, 12, 12.1, 132)] == [1, 1, 2, 11]


def test_longer_keys_cost_more_along_the_same_line(measured: Measured) -> None:
    found = [processor_ms(measured, TOY, entries, 4) for entries in (1_000, 10_000, 1_000_000)]
    assert found == pytest.approx([0.5, 1, 2])
    longer = replace(TOY, dimension=2880)
    assert processor_ms(measured, longer, 10_000, 4) == pytest.approx(1 * 0.6 / 0.5)


def test_demand_is_layers_times_tokens(measured: Measured) -> None:
    load = Load("four at a time", tokens_per_step=4, steps_per_s=25)
    asked = demand(measured, TOY, load)
    assert (asked.calls, asked.queries) == (75, 300)
    assert (asked.to_sidecar, asked.from_sidecar) == (1500, 300)
    assert (asked.to_qdrant, asked.from_qdrant) == (15_000, 6_000)
    assert asked.python_cores == pytest.approx(300 * 100e-6)


def test_every_graph_of_a_layer_is_searched(measured: Measured) -> None:
    load = Load("four at a time", tokens_per_step=4, steps_per_s=25)
    assert search_cores(measured, TOY, load, 10_000) == pytest.approx(300 * 1.0e-3)
    assert search_cores(measured, TOY, load, 10_000, graphs=10) == pytest.approx(10 * 300 * 0.5e-3)


def test_silent_layers_cost_their_call_without_the_search() -> None:
    route = {"p50_ms": 5.0, "stages_ms": {"search": 2.0}}
    assert added_ms(route, layers=16) == 80
    assert added_ms(route, layers=5, silent=11) == 5 * 5 + 11 * 3


def test_segments_under_the_servers_defaults() -> None:
    assert default_graphs(1_000, 2048) == 2
    assert default_graphs(256_000 * 8 // 8 * 5, 2048) == 5  # 8 KiB each
    assert default_graphs(256_000 * 8 // 8 * 5 + 1, 2048) == 6


def test_a_missing_measurement_is_named(measured: Measured) -> None:
    with pytest.raises(LookupError, match=r"payloads has 0 rows for .*20.*--measure"):
        measured.payload(20)


def test_numbers_in_words() -> None:
    assert [amount(n) for n in (0, 999, 1_000, 999_600, 22_345_678)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "22.3 MB",
    ]
    assert [count(n) for n in (3, 128_000, 999_600, 10_000_000, 61_440_000_000)] == [
        "3",
        "128,000",
        "1 million",
        "10 million",
        "61.4 billion",
    ]


def test_a_grid_as_markdown_and_as_numbers() -> None:
    grid = Grid("toy", "Toy", [Column("a"), Column("b", decimal(1))], [("x", 1.25), ("y", None)])
    assert grid.markdown() == "| a | b |\n| --- | ---: |\n| x | 1.2 |\n| y |  |"
    assert grid.records() == [{"a": "x", "b": 1.25}, {"a": "y", "b": None}]


def test_a_page_gets_new_grids_between_its_markers() -> None:
    grid = Grid("toy", "Toy", [Column("a")], [("x",)])
    page = f"before\n{grid.begin}\nold\n{END}\nafter\n"
    assert with_grids(page, [grid]) == f"before\n{placed(grid)}\nafter\n"
    with pytest.raises(ValueError, match="toy"):
        with_grids("no markers", [grid])


def test_the_program_writes_json_and_brings_a_page_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text("".join(f"{grid.begin}\n{END}\n" for grid in scaling.grids()))
    scaling.main(["--json", str(numbers), "--page", str(page), "--markdown"])
    assert set(json.loads(numbers.read_text())) == {grid.name for grid in scaling.grids()}
    printed = capsys.readouterr().out
    assert all(placed(grid) in page.read_text() for grid in scaling.grids())
    assert all(placed(grid) in printed for grid in scaling.grids())


@pytest.mark.parametrize("engine", SERVERS)
def test_lookups_of_a_server_are_measured(
    engine: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers, url = tmp_path / "numbers.json", url_of(engine, request)
    scaling.main(["--cluster", url, "--quick", "--json", str(numbers), "--markdown"])
    rows = json.loads(numbers.read_text())["rows"]
    cells = [(row["nodes"], row["shards"], row["replicas"], row["tokens"]) for row in rows]
    # One node has no two replicas
    assert cells == [(1, 1, 1, 1), (1, 1, 1, 16), (1, 3, 1, 1), (1, 3, 1, 16)]
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 < row["lookups_per_s"] for row in rows)
    assert all(row["request_bytes"] > 4 * 256 for row in rows)
    assert all(row["response_bytes"] > 32 * 64 * 4 for row in rows)
    assert "shards asked of other nodes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    plan = Plan(
        shards=(Shards(64, 1_500, ("none", "int8")),),
        payload_entries=500,
        pinned_entries=(500, 2_000),
        sweep_mib=1,
    )
    return measurements(plan, Progress(quiet=True))


def test_shards_are_measured_part_by_part(toy: dict[str, Any]) -> None:
    plain, quantized = toy["keys"]
    assert plain["key_bytes"] == pytest.approx(256, rel=0.05)
    assert (plain["codes_bytes"], 64 < quantized["codes_bytes"] < 80) == (0, True)
    assert plain["graph_bytes"] > 0
    assert quantized["recall_at_32"] > 0.9
    assert all(batch["processor_ms_per_query"] > 0 for batch in quantized["batches"])


def test_values_are_stored_as_base64(toy: dict[str, Any]) -> None:
    rows = {row["value_floats"]: row for row in toy["payloads"]}
    assert rows[128]["payload_bytes"] > 128 * 4 * 4 / 3 > rows[64]["payload_bytes"]


def test_ram_is_measured_with_every_kind_of_payload_index(toy: dict[str, Any]) -> None:
    """How much that is only larger shards show."""
    assert [row["indexes"] for row in toy["pinned"]] == ["none", "ram", "disk", "embedded"]
    assert all(row["bytes_per_entry"] for row in toy["pinned"])


def test_messages_hold_the_keys_and_the_values(toy: dict[str, Any]) -> None:
    for row in toy["queries"]:
        assert 4 * row["dimension"] < row["request_bytes"] < 4 * row["dimension"] + 200
        values = row["neighbours"] * row["value_floats"] * 4 * 4 / 3
        assert values < row["response_bytes"] < values + 60 * row["neighbours"]
    for row in toy["routes"]:
        assert row["request_bytes"] > 2 * (row["dimension"] + row["experts"])
