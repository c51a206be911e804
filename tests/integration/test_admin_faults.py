"""Every command of `router-admin` meets every fault: a clear error, an exit code that is not 0, the data intact."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router_service.cli.admin import app
from tests.integration.admin_runs import content_of
from tests.integration.admin_uses import USES, Use, command_names
from tests.sidecar import LOGIT_DELTA, Sidecar, random_entries, running_sidecar, serve_and_fail

MIB = 1 << 20
Refused = Callable[..., str]


def uses(wanted: Callable[[Use], bool]) -> pytest.MarkDecorator:
    """Each use that is `wanted`."""
    chosen = {name: use for name, use in USES.items() if wanted(use)}
    return pytest.mark.parametrize("use", chosen.values(), ids=list(chosen))


def fill(sidecar: Sidecar) -> None:
    """Memories `full` and `other`, with nothing in common."""
    for number, name in enumerate(("full", "other")):
        sidecar.create(name, gamma=[0.1])
        for layer in range(3):
            entries = random_entries(LOGIT_DELTA, 5, layer, first_id=1 + 100 * number)
            sidecar.upsert(name, layer, entries)


def state_of(sidecar: Sidecar) -> Any:
    """All that must not change."""
    return [(sidecar.describe(n).settings, content_of(sidecar, n)) for n in ("full", "other")]


@pytest.fixture(scope="module")
def service(fast_dir: Path) -> Iterator[Sidecar]:
    """A service with two memories, which no test changes."""
    with running_sidecar(fast_dir / "faults") as sidecar:
        fill(sidecar)
        before = state_of(sidecar)
        yield sidecar
        assert state_of(sidecar) == before


@pytest.fixture(scope="module")
def file(service: Sidecar, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`other`, exported."""
    path = tmp_path_factory.mktemp("faults") / "other.parquet"
    words = ["--target", service.target, "export", "other", str(path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    return path


def run(use: Use, target: str, name: str, file: Path) -> Any:
    """One use; nothing may be left where it would have made a file."""
    words = use.arguments(name=name, file=file, out=file.with_name("out.parquet"))
    result = CliRunner().invoke(app, ["--target", target, *words])
    assert "Traceback" not in result.output
    return result


def refused(use: Use, target: str, name: str, file: Path, code: int) -> str:
    """The one line that says why."""
    result = run(use, target, name, file)
    assert result.exit_code == code, result.output
    assert not file.with_name("out.parquet").exists()
    lines: list[str] = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("router-admin: ")
    assert len(lines[0]) < 700
    return lines[0]


def test_every_command_is_in_the_table() -> None:
    assert {name.split("/")[0] for name in USES} == command_names()


@uses(lambda use: use.needs)
def test_a_memory_that_is_not_there(service: Sidecar, file: Path, use: Use) -> None:
    line = refused(use, service.target, "nope", file, code=1)
    assert "'nope' not found" in line or "memory 'nope' has: none" in line


@pytest.mark.parametrize(
    "name", ["../x", "x" * 300, "a\0b", ""], ids=["dots", "long", "nul", "empty"]
)
@uses(lambda use: use.needs or use.makes)
def test_a_wrong_name(service: Sidecar, file: Path, use: Use, name: str) -> None:
    code = 2 if use is USES["stats"] and not name else 1
    line = refused(use, service.target, name, file, code)
    assert ascii(name)[:50] in line
    assert "not found" in line or ("got " in line and "expected" in line)


@uses(lambda use: use is not USES["doctor"])
def test_a_service_that_does_not_run(tmp_path: Path, file: Path, use: Use) -> None:
    address = f"unix:{tmp_path}/s"
    line = refused(use, address, "full", file, code=3)
    assert f"start it with: router-service serve --data DIR --listen {address}" in line


def test_the_doctor_of_a_service_that_does_not_run(tmp_path: Path, file: Path) -> None:
    found = run(USES["doctor"], f"unix:{tmp_path}/s", "", file)
    assert found.exit_code == 1
    assert "-> router-service serve" in found.stdout


def test_a_file_that_cannot_be_made(service: Sidecar) -> None:
    words = ["--target", service.target, "export", "full", "/proc/x.parquet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith("router-admin: /proc/x.parquet")


def test_a_second_service_on_the_same_directory(data: Path) -> None:
    with running_sidecar(data) as first:
        fill(first)
        before = state_of(first)
        second = serve_and_fail("--data", str(data), "--listen", "127.0.0.1:0")
        assert second.returncode == 1
        assert f"in use by process {first.process.pid}; stop it, or choose another" in second.stderr
        assert state_of(first) == before


@contextmanager
def small_disk(directory: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs; skips where it cannot be mounted."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.fixture(scope="module")
def full_disk(fast_dir: Path) -> Iterator[Sidecar]:
    """A service whose small disk is filled by somebody else; afterwards nothing has changed, and it can write again."""
    with small_disk(fast_dir / "small", 512) as disk:
        flags = ["--min-free-mib", "64"]
        with running_sidecar(disk / "data", flags=flags) as sidecar:
            fill(sidecar)
            words = ["snapshot", "create", "full", "--as", "monday"]
            assert CliRunner().invoke(app, ["--target", sidecar.target, *words]).exit_code == 0
            before = state_of(sidecar)
            filler = disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - 32 * MIB))
            yield sidecar
            assert state_of(sidecar) == before
            filler.unlink()
            sidecar.upsert("full", 0, random_entries(LOGIT_DELTA, 1, 9, first_id=999))


@uses(lambda use: use.grows)
def test_a_full_disk(full_disk: Sidecar, file: Path, use: Use) -> None:
    line = refused(use, full_disk.target, "new" if use.makes else "full", file, code=1)
    assert "bytes free" in line
    assert "free some space or move the data directory" in line


@uses(lambda use: use.reads)
def test_reading_goes_on_with_a_full_disk(full_disk: Sidecar, file: Path, use: Use) -> None:
    result = run(use, full_disk.target, "full", file)
    assert result.exit_code == 0, result.output
    file.with_name("out.parquet").unlink(missing_ok=True)


def test_the_doctor_sees_a_full_disk(full_disk: Sidecar, file: Path) -> None:
    found = run(USES["doctor"], full_disk.target, "", file)
    assert found.exit_code == 1
    assert "error    disk: writes are refused" in found.stdout


def test_a_directory_that_is_read_only(fast_dir: Path) -> None:
    """No service starts on it, which is what every other command then says; the doctor says why."""
    with small_disk(fast_dir / "fixed", 512) as disk:
        data = disk / "data"
        flags = ["--min-free-mib", "0"]
        with running_sidecar(data, flags=flags) as sidecar:
            fill(sidecar)
            before = state_of(sidecar)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refusal = serve_and_fail("--data", str(data), "--listen", "127.0.0.1:0")
        assert refusal.returncode == 1
        assert f"router-service: cannot open {data}" in refusal.stderr
        assert "Read-only file system" in refusal.stderr
        assert "Traceback" not in refusal.stderr
        found = CliRunner().invoke(app, ["doctor", "--data", str(data)])
        assert found.exit_code == 1
        assert "cannot be written to" in found.stdout
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        with running_sidecar(data, flags=flags) as sidecar:
            assert state_of(sidecar) == before
