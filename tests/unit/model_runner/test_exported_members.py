"""What `model_runner` exports, and that importing it is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import model_runner


def test_the_public_list_and_where_it_is_at_home() -> None:
    assert sorted(model_runner._HOMES) == sorted(model_runner.__all__)
    for name in model_runner.__all__:
        found = getattr(model_runner, name)
        assert found.__module__ == f"model_runner.{model_runner._HOMES[name]}"
        assert found.__doc__
        assert name in dir(model_runner)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RouterClents'"):
        _ = model_runner.RouterClents


def test_importing_it_waits_for_nothing() -> None:
    check = "import sys, model_runner; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
