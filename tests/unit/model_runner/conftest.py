"""Tiny models, one thread: the box is shared and the tensors are small."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
