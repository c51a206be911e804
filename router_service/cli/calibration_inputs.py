"""Router inputs of held-out text for `router-admin calibrate`: safetensors with layers.N.router_inputs [n, d]."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from knnmoe.tensors import to_tensor
from knnmoe.v1 import memory_admin_pb2 as pb

from router_service.cli.admin_errors import BadInput
from router_service.cli.entry_files import FileError
from router_service.cli.entry_files.tensor_file import TensorFile

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
