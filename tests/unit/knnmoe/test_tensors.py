import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from knnmoe import tensors
from knnmoe.v1 import types_pb2
from knnmoe.v1.types_pb2 import Tensor

DTYPES = [np.float32, np.float16, np.int32, np.uint64, np.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_back_as_they_went(dtype: type) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    back = tensors.to_array(tensors.to_tensor(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_decoding_is_a_view_of_the_message() -> None:
    message = tensors.to_tensor(np.ones((2, 2), np.float32))
    assert not tensors.to_array(message).flags.owndata


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2), elements=st.floats(width=32)))
def test_bf16_rounds_to_nearest_even_as_torch_does(array: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.tensor(array).bfloat16().float().numpy()
    back = tensors.to_array(tensors.to_tensor(array, bf16=True))
    np.testing.assert_array_equal(back, expected)


def test_a_strided_array_is_packed_in_c_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(tensors.to_array(tensors.to_tensor(array)), array)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Tensor(dtype=types_pb2.DTYPE_F32, shape=[2, 2], data=b"\0" * 15), "15 bytes, expected 16"),
        (Tensor(shape=[1], data=b"\0\0\0\0"), "dtype unspecified"),
        (Tensor(dtype=99, shape=[1], data=b"\0"), "unknown\\(99\\)"),  # type: ignore[arg-type]
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(message: Tensor, words: str) -> None:
    with pytest.raises(tensors.TensorError, match=words):
        tensors.to_array(message)


def test_a_dtype_without_a_wire_form_is_refused() -> None:
    with pytest.raises(tensors.TensorError, match="int64"):
        tensors.to_tensor(np.arange(3))
