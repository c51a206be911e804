"""The server's own quantizations of search keys, as its messages. Search keys apart are the embedded backend's."""

from __future__ import annotations

from typing import Any

from router_service.backends.base import Compression, Quantization
from router_service.backends.qdrant_server.wire import q
from router_service.errors import InvalidField

_TURBO_BITS = {
    Quantization.TURBO4: q.TurboQuantBitSize.Bits4,
    Quantization.TURBO2: q.TurboQuantBitSize.Bits2,
    Quantization.TURBO1: q.TurboQuantBitSize.Bits1,
}
OWN = (
    Quantization.NONE,
    Quantization.INT8,
    *_TURBO_BITS,
    Quantization.BINARY,
    Quantization.PRODUCT,
)


def require_own(compression: Compression) -> None:
    """Raises InvalidField for search keys that are stored beside the keys."""
    if compression.apart:
        expected = (
            f"one of {', '.join(OWN)}: a Qdrant server has these, the others need --backend edge"
        )
        raise InvalidField("compression", compression.label, expected)


def quantization_diff(quantization: Quantization) -> Any:
    """What makes a collection change to a quantization, held in RAM."""
    if quantization is Quantization.NONE:
        return q.QuantizationConfigDiff(disabled=q.Disabled())
    if quantization is Quantization.INT8:
        return q.QuantizationConfigDiff(
            scalar=q.ScalarQuantization(type=q.QuantizationType.Int8, always_ram=True)
        )
    if quantization is Quantization.BINARY:
        return q.QuantizationConfigDiff(binary=q.BinaryQuantization(always_ram=True))
    if quantization is Quantization.PRODUCT:
        product = q.ProductQuantization(compression=q.CompressionRatio.x16, always_ram=True)
        return q.QuantizationConfigDiff(product=product)
    turbo = q.TurboQuantization(bits=_TURBO_BITS[quantization], always_ram=True)
    return q.QuantizationConfigDiff(turboquant=turbo)


def compression_from(config: Any) -> Compression:
    """The compression that a collection's configuration (CollectionConfig) asks for."""
    match config.quantization_config.WhichOneof("quantization"):
        case "scalar":
            return Compression(Quantization.INT8)
        case "binary":
            return Compression(Quantization.BINARY)
        case "product":
            return Compression(Quantization.PRODUCT)
        case "turboquant":
            bits = config.quantization_config.turboquant.bits
            found = [each for each, size in _TURBO_BITS.items() if size == bits]
            return Compression(found[0] if found else Quantization.TURBO4)
    return Compression()
