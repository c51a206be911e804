"""Messages and domain objects are the same thing twice."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import routing_pb2 as routing_pb
from knnmoe.v1 import types_pb2
from numpy.typing import NDArray

from router_service.arrays import Assignment, Entries, Neighbours, Provenance
from router_service.blending import Support
from router_service.errors import InvalidField, InvalidTensor
from router_service.fingerprint import ModelFingerprint
from router_service.memories.layer import RouteAnswer
from router_service.memories.settings import PRESETS, Kind, MemorySettings, Similarity
from router_service.rpc import codec

F32 = NDArray[np.float32]
floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


@given(floats)
def test_f32_arrives_as_it_left(array: F32) -> None:
    got = codec.decode_floats("x", tensors.to_tensor(array))
    assert got.tobytes() == array.tobytes()


@given(floats)
def test_bf16_arrives_within_half_a_unit_in_the_last_place(array: F32) -> None:
    got = codec.decode_floats("x", tensors.to_tensor(array, bf16=True))
    assert got.dtype == np.float32
    assert (np.abs(got - array) <= np.abs(array) * 2.0**-8 + 2.0**-133).all()
    again = tensors.to_tensor(got, bf16=True)
    assert codec.decode_floats("x", again).tobytes() == got.tobytes()


@given(hnp.arrays(np.float16, (2, 3), elements=st.floats(-1000, 1000, width=16)))
def test_f16_is_widened_exactly(array: Any) -> None:
    got = codec.decode_floats("x", tensors.to_tensor(array))
    assert np.array_equal(got, array.astype(np.float32))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (types_pb2.Tensor(), "dtype unspecified"),
        (types_pb2.Tensor(dtype=99), r"dtype unknown\(99\)"),
        (tensors.to_tensor(np.zeros(3, np.int32)), "dtype i32"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_F32, shape=[2], data=b"1234"), "4 bytes"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_F32, shape=[1] * 5, data=b"1234"), "5 dimensions"),
        (types_pb2.Tensor(dtype=types_pb2.DTYPE_BF16, shape=[0] + [2**32 - 1] * 3), "shape"),
    ],
)
def test_tensors_that_contradict_themselves(tensor: types_pb2.Tensor, words: str) -> None:
    with pytest.raises(InvalidTensor, match=rf"x: got '{words}"):
        codec.decode_floats("x", tensor)


@pytest.mark.parametrize("shape", [(), (0, 4), (4,), (0,), (1, 1, 1, 1)])
@pytest.mark.parametrize("bf16", [False, True])
def test_any_small_shape_arrives(shape: tuple[int, ...], bf16: bool) -> None:
    got = codec.decode_floats("x", tensors.to_tensor(np.ones(shape, np.float32), bf16=bf16))
    assert got.shape == shape


def test_scalars_are_no_ids_and_no_assignments() -> None:
    with pytest.raises(InvalidTensor, match=r"ids: got 'shape \[\]'"):
        codec.decode_ids("ids", tensors.to_tensor(np.array(3, np.uint64)))
    scalar = types_pb2.SparseAssignment(
        experts=tensors.to_tensor(np.array(1, np.int32)),
        weights=tensors.to_tensor(np.array(1, np.float32)),
    )
    with pytest.raises(InvalidTensor, match=r"a\.experts: got 'shape \[\]'"):
        codec.decode_assignment("a", scalar)


@st.composite
def entries(draw: st.DrawFn, kind: Kind) -> Entries:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, width = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    values = rng.standard_normal((n, 2 * width)).astype(np.float32)
    if kind is Kind.ASSIGNMENT:
        values[:, :width] = rng.integers(0, 65_536, (n, width))
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    origins = [
        Provenance(
            draw(text),
            draw(text),
            draw(st.integers(0, 2**32 - 1)),
            draw(st.integers(-1, 2**31 - 1)),
            0.5,
            7,
            draw(text),
            draw(st.integers(0, 2**32 - 1)),
            draw(st.integers(0, 2**32 - 1)),
        )
        for _ in range(n)
    ]
    ids = rng.integers(0, 2**63, n, dtype=np.uint64)
    return Entries(ids, rng.standard_normal((n, 3)).astype(np.float32), values, origins)


@pytest.mark.parametrize("kind", Kind)
@given(data=st.data())
def test_entries_come_back(kind: Kind, data: st.DataObject) -> None:
    sent = data.draw(entries(kind))
    got = codec.decode_entries(codec.encode_entries(sent, kind), kind)
    for field in ("ids", "keys", "values"):
        assert np.array_equal(getattr(got, field), getattr(sent, field))
    assert list(got.provenance) == list(sent.provenance)


def test_entries_without_provenance_get_an_empty_one() -> None:
    message = codec.encode_entries(
        Entries(
            np.arange(2, dtype=np.uint64),
            np.ones((2, 3), np.float32),
            np.ones((2, 4), np.float32),
            [],
        ),
        Kind.LOGIT_DELTA,
    )
    assert list(codec.decode_entries(message, Kind.LOGIT_DELTA).provenance) == [Provenance()] * 2


@pytest.mark.parametrize(("kind", "other"), permutations(Kind, 2))
def test_values_of_another_kind(kind: Kind, other: Kind) -> None:
    row = np.ones((1, 4), np.float32)
    message = codec.encode_entries(Entries(np.zeros(1, np.uint64), row, row, [Provenance()]), kind)
    with pytest.raises(InvalidField, match=r"entries\.values"):
        codec.decode_entries(message, other)
    message.ClearField("values")
    with pytest.raises(InvalidField, match="got 'nothing'"):
        codec.decode_entries(message, kind)


def test_provenance_has_the_fields_of_the_contract() -> None:
    wire = {field.name for field in types_pb2.Provenance.DESCRIPTOR.fields}
    assert {field.name for field in fields(Provenance)} == wire


def test_fingerprints_come_back() -> None:
    fingerprint = ModelFingerprint("olmoe", 16, 2048, 64, 8, "ab" * 32)
    assert codec.decode_fingerprint(codec.encode_fingerprint(fingerprint)) == fingerprint
    wire = {field.name for field in types_pb2.ModelFingerprint.DESCRIPTOR.fields}
    assert {field.name for field in fields(ModelFingerprint)} == wire


settings = st.builds(
    MemorySettings,
    preset=st.sampled_from(sorted(PRESETS)),
    kind=st.sampled_from(Kind),
    similarity=st.sampled_from(Similarity),
    neighbours=st.integers(1, 1024),
    gamma=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3).map(tuple),
    step_size=st.lists(st.floats(-10, 10), min_size=1, max_size=3).map(tuple),
    null_weight=st.floats(0, 10),
    min_lambda=st.floats(0, 0.9),
    support=st.sampled_from(Support),
    layers=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    rounds=st.integers(0, 9),
    round_nll=st.lists(st.floats(0, 20), max_size=4).map(tuple),
)


@given(settings)
def test_settings_come_back_with_every_field_set(stored: MemorySettings) -> None:
    message = codec.encode_settings(stored)
    optional = [field for field in message.DESCRIPTOR.fields if field.has_presence]
    unset = {field.name for field in optional if not message.HasField(field.name)}
    assert unset == (set() if stored.rounds else {"rounds"})
    # Unset lists mean "the preset's"; presets list no layers.
    assert codec.decode_settings(message) == stored


def test_what_is_not_set_comes_from_the_preset() -> None:
    message = types_pb2.MemorySettings(preset="paper", neighbours=3)
    assert codec.decode_settings(message) == replace(PRESETS["paper"], neighbours=3)
    assert codec.decode_settings(types_pb2.MemorySettings()) == PRESETS["recommended"]


@pytest.mark.parametrize("name", ["kind", "similarity", "support"])
@pytest.mark.parametrize("number", [0, 77])
def test_enum_numbers_that_mean_nothing(name: str, number: int) -> None:
    message = types_pb2.MemorySettings()
    setattr(message, name, number)
    with pytest.raises(InvalidField, match=rf"settings\.{name}: got {number}"):
        codec.decode_changes(message)


def _answer(blended: Any) -> RouteAnswer:
    return RouteAnswer(
        blended,
        np.array([0.5], np.float32),
        np.array([0], np.uint8),
        Neighbours.empty(1, 1),
        np.zeros((1, 1), np.float32),
        search_ns=2,
        blend_ns=3,
        version=4,
    )


@pytest.mark.parametrize("dtype", [types_pb2.DTYPE_F32, types_pb2.DTYPE_F16, types_pb2.DTYPE_BF16])
def test_answers_have_the_dtype_of_the_request(dtype: types_pb2.Dtype) -> None:
    request = routing_pb.RouteRequest(request_id=9)
    request.router_logits.dtype = dtype
    reply = codec.encode_answer(request, _answer(np.array([[1.5, -2.0]], np.float32)))
    assert (reply.request_id, reply.memory_version, reply.times.search_ns) == (9, 4, 2)
    assert reply.router_logits.dtype == dtype
    assert tensors.to_array(reply.router_logits).tolist() == [[1.5, -2.0]]


def test_logits_beyond_f16_saturate() -> None:
    request = routing_pb.RouteRequest()
    request.router_logits.dtype = types_pb2.DTYPE_F16
    reply = codec.encode_answer(request, _answer(np.array([[1e6, -1e6]], np.float32)))
    assert tensors.to_array(reply.router_logits).tolist() == [[65504.0, -65504.0]]


def test_an_assignment_and_an_abstention() -> None:
    request = routing_pb.RouteRequest()
    request.assignment.weights.dtype = types_pb2.DTYPE_F32
    blended = Assignment(np.array([[1, 2]], np.int32), np.array([[0.25, 0.75]], np.float32))
    reply = codec.encode_answer(request, _answer(blended))
    assert tensors.to_array(reply.assignment.experts).tolist() == [[1, 2]]
    assert tensors.to_array(reply.assignment.weights).tolist() == [[0.25, 0.75]]
    assert codec.encode_answer(request, _answer(None)).WhichOneof("blended") is None


def test_an_own_routing_is_needed() -> None:
    with pytest.raises(InvalidField, match="own: got 'nothing'"):
        codec.decode_query(routing_pb.RouteRequest())


def test_durability_is_a_known_one() -> None:
    assert set(admin_pb.Durability.keys()) == {
        "DURABILITY_UNSPECIFIED",
        "DURABILITY_PROCESS",
        "DURABILITY_FSYNC",
    }
