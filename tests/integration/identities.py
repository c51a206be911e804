"""Certificates, tokens and their files: who is who in tests of identity."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from knnmoe.client import Credentials

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


SECRETS = {
    name: f"{name}-secret-{'0123456789' * 3}"
    for name in ("reader", "learner", "admin", "all", "root")
}
TOKENS = {
    "reader": ("read", ["law"]),
    "learner": ("learn", ["law"]),
    "admin": ("admin", ["law"]),
    "all": ("read", "all"),
    "root": ("admin", "all"),
}


def token_table(name: str, secret: str | None = None) -> str:
    role, memories = TOKENS[name]
    lines = [
        "[[token]]",
        f'name = "{name}"',
        f'role = "{role}"',
        f"memories = {json.dumps(memories)}",
    ]
    return "\n".join([*lines, f'secret = "{secret or SECRETS[name]}"', ""])


def write(path: Path, text: str) -> Path:
    """Whole at one moment, as an operator's tool does, and for the owner alone."""
    new = path.with_name(f"{path.name}.new")
    new.touch(0o600)
    new.write_text(text)
    return new.rename(path)


class Place:
    """A directory with an authority's certificates, a file of tokens, and one for each token."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority(directory / "authority")
        self.cert, self.key = self.authority.signed("service")
        self.client_cert, self.client_key = self.authority.signed("client")
        self.tokens = write(directory / "tokens.toml", "\n".join(map(token_table, TOKENS)))
        self.files = {n: write(directory / f"{n}.token", f"{SECRETS[n]}\n") for n in TOKENS}
        self.files["wrong"] = write(directory / "wrong.token", "nobody-has-given-this-one-out")
        self.audit = directory / "audit.jsonl"

    def flags(self, *, tls: bool = False, mutual: bool = False, tokens: bool = False) -> list[str]:
        given: list[Any] = []
        if tls:
            given += ["--tls-cert", self.cert, "--tls-key", self.key]
        if mutual:
            given += ["--tls-client-ca", self.authority.ca]
        if tokens:
            given += ["--tokens", self.tokens, "--audit-log", self.audit]
        return [str(each) for each in given]

    def credentials(self, token: str | None = None, **fields: Any) -> Credentials:
        return Credentials(token_file=None if token is None else self.files[token], **fields)
