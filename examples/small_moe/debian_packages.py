"""Fetch Debian packages and unpack them without being root.

Only `apt-get download` and `dpkg -x` are used: nothing is installed, no package script is run.
"""

import subprocess
from pathlib import Path


class PackageUnavailableError(RuntimeError):
    """A Debian package could not be downloaded or unpacked."""


def unpacked(package: str, cache: Path) -> Path:
    """Return the directory with the files of `package`, fetched into `cache` on first use."""
    target = cache / "unpacked" / package
    if not target.exists():
        partial = target.with_name(f"{package}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        _run(["dpkg", "-x", str(_archive(package, cache)), str(partial)], cache)
        partial.rename(target)
    return target


def archive_version(package: str, cache: Path) -> str:
    """Return the Debian version of the archive in `cache`, for the record."""
    return _run(["dpkg-deb", "-f", str(_archive(package, cache)), "Version"], cache).strip()


def _archive(package: str, cache: Path) -> Path:
    downloads = cache / "archives"
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = f"{package}_*.deb"
    if not any(downloads.glob(pattern)):
        _run(["apt-get", "download", package], downloads)
    return max(downloads.glob(pattern))


def _run(command: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise PackageUnavailableError(f"{' '.join(command)}: {detail}") from error
    return done.stdout
