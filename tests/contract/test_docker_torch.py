"""docker/torch.sh takes torch from any index, and neither CUDA nor nothing without a word."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.images.dockerfile import DOCKER

VERSION = "2.13.0"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Without pip, as the images have it."""
    made = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (tmp_path / "constraints.txt").write_text(f"torch=={VERSION}\n")
    return made


@pytest.mark.parametrize("how", ["index", "wheels"])
def test_it_installs_from_an_index_or_a_directory(environment: Path, how: str) -> None:
    index = index_with_torch(environment.parent, cuda=None)
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index / "torch")}
    given = wheels if how == "wheels" else {"TORCH_INDEX": index.as_uri()}
    done = install(environment, **given)
    assert done.returncode == 0, done.stderr
    assert list(environment.glob("lib/python3*/site-packages/torch/version.py"))


@pytest.mark.parametrize(("allowed", "code"), [("", 1), ("1", 0)])
def test_cuda_is_allowed_or_refused(environment: Path, allowed: str, code: int) -> None:
    index = index_with_torch(environment.parent, cuda="13.0")
    done = install(environment, TORCH_INDEX=index.as_uri(), CUDA=allowed)
    assert done.returncode == code, done.stderr
    said = f"TORCH_INDEX={index.as_uri()} has a build with CUDA 13.0"
    assert (said in done.stderr) is bool(code)
    assert ("--build-arg CUDA=1" in done.stderr) is bool(code)


def test_an_index_without_torch_is_named(environment: Path) -> None:
    missing = (environment.parent / "nothing").as_uri()
    done = install(environment, TORCH_INDEX=missing)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"torch: none from TORCH_INDEX={missing}")
    assert "--build-arg TORCH_INDEX=URL" in last


def install(environment: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    pip = shutil.which("pip", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert pip is not None
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    kept |= {"PATH": f"{Path(pip).parent}:{os.environ['PATH']}", "TORCH_INDEX": "file:///none"}
    # pip's own configuration of this machine may name indexes that are asked as well.
    kept["PIP_CONFIG_FILE"] = os.devnull
    return subprocess.run(
        ["sh", DOCKER / "torch.sh", environment],
        cwd=environment.parent,
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def index_with_torch(directory: Path, cuda: str | None) -> Path:
    """A package index with a wheel that is named torch and holds its version alone."""
    page = directory / "index/torch"
    page.mkdir(parents=True)
    name = f"torch-{VERSION}-py3-none-any.whl"
    info = f"torch-{VERSION}.dist-info"
    files = {
        "torch/version.py": f"cuda = {cuda!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(page / name, "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)
    (page / "index.html").write_text(f'<a href="{name}">{name}</a>\n')
    return page.parent


def _digest(text: str) -> str:
    raw = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={raw.decode().rstrip('=')}"
