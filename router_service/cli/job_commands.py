"""Commands that measure and index a memory: `router-admin calibrate`, `optimize` and `quantize`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from knnmoe.tensors import to_tensor
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import quantization_pb2 as quantization_pb

from router_service.backends.base import Compression, Projection, Quantization
from router_service.cli.errors import BadInput
from router_service.cli.operation_commands import followed
from router_service.cli.options import AdminTyper, ExampleCommand, MemoryName, OnlyLayers
from router_service.cli.output import Session, plain, session_of
from router_service.transfer.entry_fields import FileError
from router_service.transfer.safetensors import TensorFile

R = TypeVar("R", pb.CalibrateWatchedRequest, quantization_pb.MeasureQuantizationRequest)

# Half of what a message may hold; more rows than fit are thinned out evenly.
MAX_INPUT_BYTES = 32 * 1024 * 1024
_NAME = re.compile(r"layers\.(\d{1,5})\.router_inputs")
_INDEXED = ("layer", "entries", "indexed_entries", "quantization", "elapsed_s", "recall")
# Of the 32 nearest; below it the user is warned.
LEAST_RECALL = 0.98
_MEASURED = (
    "layer", "compression", "oversampling", "ram_bytes_per_key", "disk_bytes_per_key", "recall_at_1",
    "lambda_error_mean", "lambda_error_max", "blend_error_mean", "blend_error_max", "ms_per_query", "build_s",
)  # fmt: skip
_SEARCHED = (
    "layer", "queries", "recall_at_1", "recall_at_k", "ms_per_lookup", "exact", "segments",
)  # fmt: skip
_PANELS = (
    ("recall_at_1", "recall@1"),
    ("lambda_error_mean", "mean error of lambda"),
    ("blend_error_mean", "mean error of the blend"),
    ("ms_per_query", "ms per query"),
)


def calibrate(
    context: typer.Context,
    name: MemoryName,
    lambda0: Annotated[
        float,
        typer.Option(
            help="Similarity that the nearest key should have at the quantile of its distance, between 0 "
            "and 1: more trusts the memory from farther away, e.g. 0.5."
        ),
    ] = 0.5,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Router inputs of held-out text, tensors layers.N.router_inputs [n, hidden_size]. Without "
            "them the memory's own keys are used, each against other examples' entries, "
            "e.g. --inputs dev.safetensors.",
        ),
    ] = None,
    quantile: Annotated[
        float,
        typer.Option(help="Quantile of the distance to the nearest key, e.g. 0.5, the median."),
    ] = 0.5,
    sample: Annotated[
        int, typer.Option(min=1, help="Keys taken per layer when no inputs are given, e.g. 1000.")
    ] = 1000,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only report; store nothing, e.g. calibrate bible --dry-run."
        ),
    ] = False,
) -> None:
    """Set the RBF bandwidth gamma of each layer from the distances to its nearest keys.

    Every key is compared. Ctrl-C ends it, and nothing is stored; with --inputs what was measured until then is.

    Example:
      router-admin calibrate bible --lambda0 0.5 --inputs dev.safetensors
      router-admin --json calibrate bible --lambda0 0.8 --dry-run

    """
    session = session_of(context)
    calibration = pb.CalibrateWatchedRequest(
        memory=name, lambda0=lambda0, quantile=quantile, sample=sample, dry_run=dry_run
    )
    found: list[pb.LayerCalibration] = []
    for request in _with_inputs(calibration, inputs):
        watched = session.client.admin.CalibrateWatched
        for reply in followed(session, watched, request, "calibration"):
            found += reply.calibration.layers
    layers = [plain(item) for item in found]
    title = f"gamma of {name}, " + ("would be" if dry_run else "stored")
    session.output.table(
        {"memory": name, "lambda0": lambda0, "dry_run": dry_run, "layers": layers},
        ("layer", "squared_distance", "gamma", "queries", "copies"),
        layers,
        title,
    )
    if remark := copies_remark(name, found):
        session.output.remark(remark)


def copies_remark(memory: str, layers: Sequence[pb.LayerCalibration]) -> str:
    """What to say when most nearest entries were copies; nothing when they were not."""
    most = [layer for layer in layers if 2 * layer.copies > layer.queries]
    if not most:
        return ""
    copies, queries = (sum(getattr(one, name) for one in most) for name in ("copies", "queries"))
    return (
        f"note: the nearest entry of {copies} of {queries} tokens is a copy of it (text made from a template, or "
        "there twice). Copies counted as the token's own example, so gamma is that of text that differs. "
        f"`router-admin prune {memory} --near-duplicates 0.98 --dry-run` shows what removing them would change"
    )


def optimize(
    context: typer.Context,
    name: MemoryName,
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Compression of the search keys, e.g. int8; results are rescored. When not given each layer "
            "keeps its own. `quantize` says more and measures.",
            show_default=False,
        ),
    ] = None,
    layer: OnlyLayers = None,
    recall: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Also choose hnsw_ef and oversampling: the least by which lookups find this share of the nearest and "
            "of the K nearest entries, measured on keys of every layer, e.g. 0.99. Stored in the memory's settings. "
            "A layer that finds fewer whatever the candidates is searched exactly from then on.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build the search index of a memory's layers. The service answers meanwhile; Ctrl-C ends it.

    A layer that a scan answers as fast gets none (4,096 entries, of 2,048 numbers 1,024); --quantization indexes it.

    Example:
      router-admin optimize bible --quantization int8
      router-admin optimize bible --layer 15
      router-admin optimize bible --recall 0.99

    """
    session = session_of(context)
    request = pb.OptimizeRequest(
        memory=name, layers=layer, quantization=quantization or "", recall=recall or 0
    )
    choices: list[pb.SearchChoice] = []
    layers = _indexed(session, session.client.admin.Optimize, request, choices)
    document: dict[str, Any] = {"memory": name, "layers": layers}
    if not choices:
        session.output.table(document, _INDEXED, layers)
        return
    chosen = choices[-1]
    measured = [plain(each) for each in chosen.layers]
    document["search"] = plain(chosen) | {"layers": measured}
    title = f"hnsw_ef {chosen.hnsw_ef}, oversampling {chosen.oversampling:g}, K = {chosen.neighbours}: stored"
    rows = [[_short(row[column]) for column in _SEARCHED] for row in measured]
    session.output.table(document, _SEARCHED, rows, title)
    if exact := [each.layer for each in chosen.layers if each.exact]:
        session.output.remark(_not_reached(name, recall or 0, exact))


def _not_reached(memory: str, recall: float, layers: Sequence[int]) -> str:
    numbers = ", ".join(map(str, layers))
    return (
        f"warning: layers {numbers}: no number of candidates finds {recall:.1%}: their search keys do not bear it, so "
        f"every entry is looked at from now on, which is exact and slow. float16 compares keys nearly as they are: "
        f"router-admin quantize {memory} --method float16, then optimize {memory} --recall {recall:g} again"
    )


class QuantizeCommand(ExampleCommand):
    """--json may go without its FILE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts - where FILE could be."""
        given = [*args, "--"]  # what follows the last one is an option, or nothing
        whole = [
            word
            for one, following in pairwise(given)
            for word in ([one, "-"] if one == "--json" and following[:2] == "--" else [one])
        ]
        return super().parse_args(ctx, whole)


quantize_app = AdminTyper()


@quantize_app.command("quantize", cls=QuantizeCommand)
def quantize(
    context: typer.Context,
    name: MemoryName,
    method: Annotated[
        Quantization | None,
        typer.Option(
            help="How the numbers of the search keys are compressed, e.g. int8; none undoes it."
        ),
    ] = None,
    oversampling: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=100,
            help="How many times K candidates are rescored with the stored keys, e.g. 4. When not given: what "
            "the method needs (docs/quantization.md). Stored in the memory's settings.",
            show_default=False,
        ),
    ] = None,
    search_dimension: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Search by that many numbers per key instead of hidden_size, e.g. 64; distances still come "
            "from the whole stored keys.",
            show_default=False,
        ),
    ] = None,
    projection: Annotated[
        Projection,
        typer.Option(
            help="What they are: the directions in which the layer's keys vary most, or random ones, e.g. pca."
        ),
    ] = Projection.PCA,
    layer: OnlyLayers = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Change nothing; try methods on copies and compare them with exact search, e.g. quantize bible "
            "--measure.",
        ),
    ] = False,
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="With --measure: what to try, methods and reductions, e.g. none,int8,pca64,pca64+turbo4. All "
            "methods when not given.",
        ),
    ] = "",
    sample: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            help="With --measure: queries per layer, its own keys, which the copies are measured without; at most a "
            "quarter of them, e.g. 500.",
        ),
    ] = 500,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="With --measure: router inputs of held-out text instead, as for calibrate, e.g. --inputs "
            "dev.safetensors.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="[FILE]",
            help="Without FILE, or with -: as for every command. With FILE and --measure: also write the results "
            "there, e.g. --json trade-off.json.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="With --measure: also draw error against bytes per key there, e.g. --plot trade-off.png.",
        ),
    ] = None,
) -> None:
    """Compress the search keys of a memory, or measure what each method costs. The service answers meanwhile.

    Answers are rescored with the stored keys, so similarities stay exact; a method can only miss neighbours. Undone
    by --method none. Ctrl-C ends it in a sound state.

    Example:
      router-admin quantize bible --measure --methods none,int8,turbo4 --plot trade-off.png
      router-admin quantize bible --method int8
      router-admin quantize bible --method turbo4 --search-dimension 64 --layer 15
      router-admin quantize bible --method none

    """
    session = session_of(context)
    if json_file == Path("-"):
        session.output.as_json, json_file = True, None
    if measure == (method is not None or search_dimension is not None):
        raise BadInput(
            "give either --measure, or --method (and --search-dimension) to change the memory"
        )
    if not measure:
        wanted = Compression(method or Quantization.NONE, search_dimension or 0, projection)
        change = quantization_pb.QuantizeRequest(
            memory=name, layers=layer, compression=wanted.label, oversampling=oversampling or 0
        )
        _quantize(session, change)
        return
    if plot is not None:
        _require_plotting()
    request = quantization_pb.MeasureQuantizationRequest(
        memory=name,
        layers=layer,
        compressions=[part.strip() for part in methods.split(",")] if methods else [],
        sample=sample,
        oversampling=oversampling or 0,
    )
    requests = list(_with_inputs(request, inputs, layer))
    if not requests:
        raise BadInput("--inputs: the file has none of the layers that --layer names")
    _measure(session, requests, json_file, plot)


def _quantize(session: Session, request: quantization_pb.QuantizeRequest) -> None:
    layers = _indexed(session, session.client.quantization.Quantize, request)
    oversampling = session.client.describe(request.memory).settings.oversampling
    document = {"memory": request.memory, "oversampling": oversampling, "layers": layers}
    session.output.table(document, _INDEXED, layers, f"oversampling {oversampling:g}")


def _measure(
    session: Session,
    requests: list[quantization_pb.MeasureQuantizationRequest],
    json_file: Path | None,
    plot: Path | None,
) -> None:
    measure = session.client.quantization.MeasureQuantization
    found = [
        plain(reply.measurement)
        for request in requests
        for reply in followed(session, measure, request, "measurement")
    ]
    document: dict[str, Any] = {"memory": requests[0].memory, "measurements": found}
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=2) + "\n")
    if plot is not None:
        _plot(found, plot)
    cells = [[_short(row[column]) for column in _MEASURED] for row in found]
    session.output.table(document, _MEASURED, cells)


def _short(value: Any) -> Any:
    """Floats with 4 digits: the columns have to fit on a line."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise BadInput(f"--json: {path}: {error.strerror}") from error


def _indexed(
    session: Session, method: Any, request: Any, choices: list[pb.SearchChoice] | None = None
) -> list[dict[str, Any]]:
    """The layers of an operation that indexes, each with the seconds that it took and the recall that it has now.

    `choices`: gets how the memory is searched from then on, where that was asked for.
    """
    layers = []
    results = ("layer",) if choices is None else ("layer", "search")
    for reply in followed(session, method, request, *results):
        if choices is not None and reply.HasField("search"):
            choices.append(reply.search)
            continue
        recall = round(reply.recall, 4) if reply.HasField("recall") else None
        layer = plain(reply.layer) | {"elapsed_s": round(reply.elapsed_s, 3), "recall": recall}
        layers.append(layer)
        if recall is not None and recall < LEAST_RECALL:
            session.output.remark(
                f"warning: layer {layer['layer']}: searches find {recall:.1%} of the 32 nearest entries with "
                f"{layer['quantization']}: its keys do not bear it. float16 compares them nearly as they are "
                f"(router-admin quantize {request.memory} --method float16); --measure compares the methods"
            )
    for layer in layers:
        if not layer["indexed_entries"] and layer["entries"]:
            session.output.remark(
                f"layer {layer['layer']}: searched exactly: {layer['entries']} entries need no index"
            )
    return sorted(layers, key=lambda layer: int(layer["layer"]))


def _with_inputs(request: R, file: Path | None, layers: Sequence[int] | None = None) -> Iterator[R]:
    """One request for all layers, or one per layer of the file: a whole file would not fit in a message."""
    if file is None:
        yield request
        return
    for item in _read_inputs(file):
        if not layers or item.layer in layers:
            one = type(request)(inputs=[item])
            one.MergeFrom(request)
            yield one


def _read_inputs(path: Path) -> Iterator[pb.LayerInputs]:
    """One message per layer, in the order of layers. Raises BadInput."""
    try:
        file = TensorFile(path)
    except FileError as error:
        raise BadInput(str(error)) from error
    layers = {int(found[1]): name for name in file.tensors if (found := _NAME.fullmatch(name))}
    if not layers:
        raise BadInput(f"{path}: no tensor layers.N.router_inputs")
    for layer, name in sorted(layers.items()):
        yield _layer_inputs(file, layer, name)


def _layer_inputs(file: TensorFile, layer: int, name: str) -> pb.LayerInputs:
    shape = file.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise BadInput(f"{file.path}: {name}: got shape {list(shape)}, expected [n, hidden_size]")
    step = -(-shape[0] * shape[1] * 4 // MAX_INPUT_BYTES)
    rows = file.rows(name, 0, shape[0])[::step]
    with np.errstate(over="ignore"):  # the service refuses infinities and names them
        return pb.LayerInputs(layer=layer, router_inputs=to_tensor(rows.astype(np.float32)))


def _require_plotting() -> None:
    """Raises BadInput when matplotlib is missing: better before minutes of measuring than after."""
    if find_spec("matplotlib") is None:
        raise BadInput('--plot needs matplotlib; install it with: pip install "knn-moe[runner]"')


def _plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Each quantity against the bytes of RAM per key, a mark per method and layer. Raises BadInput."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for panel, (quantity, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for compression in dict.fromkeys(row["compression"] for row in found):
            rows = [row for row in found if row["compression"] == compression]
            sizes = [row["ram_bytes_per_key"] for row in rows]
            panel.plot(sizes, [row[quantity] for row in rows], "o", label=compression)
        panel.set_xscale("log")
        panel.set_xlabel("bytes of RAM per key")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot: {path}: {error}") from error
