"""The protos are linted, and the generated code in the repository is that of the protos."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "protos" / "knnmoe" / "v1"
BUF = Path(sys.executable).with_name("buf")
RELEASES = sorted((ROOT / "tests" / "fixtures").glob("*/protos.binpb"))


def test_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True)
    fresh = {p.name: p.read_text() for p in (tmp_path / "knnmoe" / "v1").iterdir()}
    committed = {p.name: p.read_text() for p in GENERATED.glob("*_pb2*.py*")}
    assert fresh.keys() == committed.keys()
    stale = [name for name, text in fresh.items() if committed[name] != text]
    assert not stale, "run `make proto`"


def test_the_protos_pass_buf_lint() -> None:
    result = subprocess.run([BUF, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_release_has_its_protos() -> None:
    assert [path.parent for path in RELEASES] == sorted(
        path.parent for path in (ROOT / "tests" / "fixtures").glob("*/answers.json")
    )


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.parent.name)
def test_clients_and_sidecars_of_a_release_are_understood(release: Path, tmp_path: Path) -> None:
    def broken(directory: Path) -> str:
        command = [BUF, "breaking", "--against", release]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is not done.stdout, done.stderr
        return done.stdout

    assert broken(ROOT) == ""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "protos", copy / "protos")
    shutil.copy(ROOT / "buf.yaml", copy)
    changed = copy / "protos" / "knnmoe" / "v1" / "routing.proto"
    changed.write_text(changed.read_text().replace("uint32 layer = 2;", "uint64 layer = 2;"))
    assert "changed type" in broken(copy)
