"""Router inputs of held-out text for `router-admin calibrate`: safetensors with layers.N.router_inputs [n, d]."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from knnmoe.tensors import to_tensor
from knnmoe.v1 import memory_admin_pb2 as pb
from knnmoe.v1 import quantization_pb2 as quantization_pb
from rich.console import Console

from router_service.backends.base import Compression, Projection, Quantization
from router_service.cli.errors import BadInput, ExitCode
from router_service.cli.operation_commands import followed
from router_service.cli.options import MemoryName
from router_service.cli.output import plain, table
from router_service.cli.session import Session, session_of
from router_service.transfer.entry_fields import FileError
from router_service.transfer.safetensors import TensorFile

# Half of what a message may hold; more rows than fit are thinned out evenly.
MAX_INPUT_BYTES = 32 * 1024 * 1024
_NAME = re.compile(r"layers\.(\d{1,5})\.router_inputs")


def read_inputs(path: Path) -> Iterator[pb.LayerInputs]:
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


SERVICES = ("knnmoe.v1.RoutingService", "knnmoe.v1.MemoryAdminService")


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

    Example:
      router-admin calibrate bible --lambda0 0.5 --inputs dev.safetensors
      router-admin --json calibrate bible --lambda0 0.8 --dry-run

    """
    session = session_of(context)
    given: dict[str, Any] = {
        "memory": name, "lambda0": lambda0, "quantile": quantile, "sample": sample, "dry_run": dry_run
    }  # fmt: skip
    layers: list[dict[str, Any]] = []
    for request in _calibrations(given, inputs):
        reply = session.client.unary(session.client.admin.Calibrate, request, long=True)
        layers += [plain(item) for item in reply.layers]
    columns = ("layer", "squared_distance", "gamma", "queries")
    rows = [[item[column] for column in columns] for item in layers]
    title = "would be" if dry_run else "stored"
    session.output.emit(
        {"memory": name, "lambda0": lambda0, "dry_run": dry_run, "layers": layers},
        lambda console: console.print(table(columns, rows, title=f"gamma of {name}, {title}")),
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
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
        ),
    ] = None,
) -> None:
    """Build the search index of a memory's layers. The service answers meanwhile; Ctrl-C ends it.

    Example:
      router-admin optimize bible --quantization int8
      router-admin optimize bible --layer 15

    """
    session = session_of(context)
    request = pb.OptimizeRequest(memory=name, layers=layer, quantization=quantization or "")
    replies = followed(session, session.client.admin.Optimize, request)
    rows = [
        plain(reply.layer) | {"elapsed_s": round(reply.elapsed_s, 3)}
        for reply in replies
        if reply.HasField("layer")
    ]
    columns = ("layer", "entries", "indexed_entries", "quantization", "elapsed_s")
    cells = [[row[column] for column in columns] for row in rows]
    session.output.emit(
        {"memory": name, "layers": rows}, lambda console: console.print(table(columns, cells))
    )


def stats(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Only this memory, e.g. bible; all when left out.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what the service holds and what it has done since it started.

    Example:
      router-admin stats
      router-admin --json stats bible

    """
    if name == "":  # to the service: all
        raise BadInput("NAME: got '', expected the name of a memory, or nothing for all")
    session = session_of(context)
    reply = session.client.unary(session.client.admin.Stats, pb.StatsRequest(memory=name))
    document = plain(reply)

    def render(console: Console) -> None:
        service = [
            ("version", document["service_version"]),
            ("uptime", f"{document['uptime_s']} s"),
            ("resident", f"{document['resident_bytes'] / 2**20:.0f} MiB"),
            ("calls in flight", str(document["in_flight"])),
        ]
        console.print(table(("service", ""), service))
        for memory in document["memories"]:
            columns = tuple(memory["layers"][0])
            rows = [list(item.values()) for item in memory["layers"]]
            console.print(table(columns, rows, title=memory["memory"]))

    session.output.emit(document, render)


def health(context: typer.Context) -> None:
    """Ask the service whether it serves. Exit code 0: it does; 1: it is up but does not; 3: nobody answers.

    Example:
      router-admin --target unix:/run/knnmoe.sock health

    """
    session = session_of(context)
    services = {name: session.client.serving_status(name) for name in SERVICES}
    serving = all(status == "SERVING" for status in services.values())
    document = {"target": session.client.target, "serving": serving, "services": services}
    rows = list(services.items())
    session.output.emit(document, lambda console: console.print(table(("service", "status"), rows)))
    if not serving:
        raise typer.Exit(ExitCode.REFUSED)


def _calibrations(given: dict[str, Any], inputs: Path | None) -> Iterator[pb.CalibrateRequest]:
    """One request for all layers, or one per layer of the file: a whole file would not fit in a message."""
    if inputs is None:
        yield pb.CalibrateRequest(**given)
        return
    for item in read_inputs(inputs):
        yield pb.CalibrateRequest(**given, inputs=[item])


_PANELS = (
    ("recall_at_1", "recall@1"),
    ("lambda_error_mean", "mean error of lambda"),
    ("blend_error_mean", "mean error of the blend"),
    ("ms_per_query", "ms per query"),
)


def require_plotting() -> None:
    """Raises BadInput when matplotlib is missing: better before minutes of measuring than after."""
    if find_spec("matplotlib") is None:
        raise BadInput('--plot needs matplotlib; install it with: pip install "knn-moe[runner]"')


def plot_measurements(found: Sequence[dict[str, Any]], path: Path) -> None:
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


COLUMNS = (
    "layer", "compression", "oversampling", "ram_bytes_per_key", "disk_bytes_per_key", "recall_at_1",
    "lambda_error_mean", "lambda_error_max", "blend_error_mean", "blend_error_max", "ms_per_query", "build_s",
)  # fmt: skip


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
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
        ),
    ] = None,
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
            help="With --measure: queries per layer, its own keys each against other examples' entries, e.g. 500.",
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
            metavar="FILE",
            help="With --measure: also write the results there, e.g. --json trade-off.json.",
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
    if measure == (method is not None or search_dimension is not None):
        raise BadInput(
            "give either --measure, or --method (and --search-dimension) to change the memory"
        )
    if not measure:
        wanted = Compression(method or Quantization.NONE, search_dimension or 0, projection)
        _quantize(session, name, wanted, oversampling, layer)
        return
    if plot is not None:
        require_plotting()
    request = quantization_pb.MeasureQuantizationRequest(
        memory=name,
        layers=layer,
        compressions=[part.strip() for part in methods.split(",")] if methods else [],
        sample=sample,
        oversampling=oversampling or 0,
    )
    _measure(session, list(_requests(request, inputs)), json_file, plot)


def _quantize(
    session: Session,
    name: str,
    wanted: Compression,
    oversampling: float | None,
    layers: list[int] | None,
) -> None:
    request = quantization_pb.QuantizeRequest(
        memory=name, layers=layers, compression=wanted.label, oversampling=oversampling or 0
    )
    rows = [
        plain(reply.layer) | {"elapsed_s": round(reply.elapsed_s, 3)}
        for reply in followed(session, session.client.quantization.Quantize, request)
        if reply.HasField("layer")
    ]
    settings = session.client.memory(name).settings
    columns = ("layer", "entries", "indexed_entries", "quantization", "elapsed_s")
    cells = [[row[column] for column in columns] for row in rows]
    title = f"oversampling {settings.oversampling:g}"
    session.output.emit(
        {"memory": name, "oversampling": settings.oversampling, "layers": rows},
        lambda console: console.print(table(columns, cells, title=title)),
    )


def _requests(
    request: quantization_pb.MeasureQuantizationRequest, inputs: Path | None
) -> Iterator[quantization_pb.MeasureQuantizationRequest]:
    """One for all layers, or one per layer of the file: a whole file would not fit in a message."""
    if inputs is None:
        yield request
        return
    for item in read_inputs(inputs):
        if not request.layers or item.layer in request.layers:
            one = quantization_pb.MeasureQuantizationRequest()
            one.CopyFrom(request)
            one.inputs.append(item)
            yield one


def _measure(
    session: Session,
    requests: list[quantization_pb.MeasureQuantizationRequest],
    json_file: Path | None,
    plot: Path | None,
) -> None:
    if not requests:
        raise BadInput("--inputs: the file has none of the layers that --layer names")
    measure = session.client.quantization.MeasureQuantization
    found = [
        plain(reply.measurement)
        for request in requests
        for reply in followed(session, measure, request)
        if reply.HasField("measurement")
    ]
    document: dict[str, Any] = {"memory": requests[0].memory, "measurements": found}
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=2) + "\n")
    if plot is not None:
        plot_measurements(found, plot)
    cells = [[_short(row[column]) for column in COLUMNS] for row in found]
    session.output.emit(document, lambda console: console.print(table(COLUMNS, cells)))


def _short(value: Any) -> Any:
    """Floats with 4 digits: the columns have to fit on a line."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise BadInput(f"--json: {path}: {error.strerror}") from error
