"""Certificates for tests, made by openssl: an authority, and what it signs for 127.0.0.1."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """In a directory of its own: `ca` is its certificate."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self.ca, self._key = directory / "ca.pem", directory / "ca.key"
        subject = f"/CN={directory.name}"
        _openssl("req", "-x509", *_KEY, "-keyout", self._key, "-out", self.ca, "-subj", subject)

    def signed(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        cert, key, request = (self._directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        _openssl(
            "req", *_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}", "-addext", names
        )
        by = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-copy_extensions", "copyall")
        _openssl("x509", "-req", "-in", request, *by, "-out", cert)
        return cert, key


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
