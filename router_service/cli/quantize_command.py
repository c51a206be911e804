"""`router-admin quantize`: other search keys for a memory, or what each kind would cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from knnmoe.v1 import quantization_pb2 as pb

from router_service.backends.base import Compression, Projection, Quantization
from router_service.cli.admin_errors import BadInput
from router_service.cli.admin_options import MemoryName
from router_service.cli.admin_output import plain, table
from router_service.cli.admin_session import Session, session_of
from router_service.cli.calibration_inputs import read_inputs
from router_service.cli.operation_stream import followed
from router_service.cli.quantization_plot import plot_measurements, require_plotting

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
    request = pb.MeasureQuantizationRequest(
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
    request = pb.QuantizeRequest(
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
    request: pb.MeasureQuantizationRequest, inputs: Path | None
) -> Iterator[pb.MeasureQuantizationRequest]:
    """One for all layers, or one per layer of the file: a whole file would not fit in a message."""
    if inputs is None:
        yield request
        return
    for item in read_inputs(inputs):
        if not request.layers or item.layer in request.layers:
            one = pb.MeasureQuantizationRequest()
            one.CopyFrom(request)
            one.inputs.append(item)
            yield one


def _measure(
    session: Session,
    requests: list[pb.MeasureQuantizationRequest],
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
