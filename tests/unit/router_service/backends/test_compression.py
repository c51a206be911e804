"""The words for compressions, and what they ask of a search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_service.backends.base import Compression, Projection, Quantization

COMPRESSIONS = st.builds(
    Compression,
    st.sampled_from(Quantization),
    st.integers(1, 9_999_999),
    st.sampled_from(Projection),
)


@given(COMPRESSIONS)
def test_a_label_reads_back(compression: Compression) -> None:
    assert Compression.parse(compression.label) == compression


@pytest.mark.parametrize("method", Quantization)
def test_a_method_alone_is_its_name(method: Quantization) -> None:
    assert Compression.parse(method.value) == Compression(method)
    assert Compression(method).label == method.value


@pytest.mark.parametrize(
    "label",
    ["", "int3", "pca", "pca0", "pca64+", "+int8", "pca64+none", "int8+pca64", "pca-1", "pca64int8", "INT8", "int8\n"],
)  # fmt: skip
def test_other_words_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match=r"compression|valid"):
        Compression.parse(label)


def test_coarser_search_keys_are_oversampled_more() -> None:
    labels = ("int8", "turbo4", "turbo2", "turbo1", "binary")
    factors = [Compression.parse(label).oversampling for label in labels]
    assert factors == sorted(factors)
    assert Compression.parse("pca8+int8").oversampling > Compression.parse("int8").oversampling


@pytest.mark.parametrize(
    ("label", "apart"),
    [("none", False), ("int8", False), ("float16", True), ("pca8", True), ("random8+int8", True)],
)
def test_what_the_engine_cannot_do_is_stored_apart(label: str, apart: bool) -> None:
    assert Compression.parse(label).apart is apart
