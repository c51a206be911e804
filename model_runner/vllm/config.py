"""What a server is configured with: `knn_moe` in vLLM's --additional-config, or JSON in the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from knnmoe.client import BadCredentials, Credentials
from knnmoe.credentials import FILES

from model_runner.errors import BadInput
from model_runner.replica.budget import KeyDtype, parse_bytes
from model_runner.retrieval import Retrieval

KEY = "knn_moe"
ENVIRONMENT = "KNNMOE_VLLM"


@dataclass(frozen=True, slots=True)
class Config:
    """Of one server; the same names in `--additional-config '{"knn_moe": {...}}'`.

    Attributes:
        target: address of the sidecar.
        memories: those that requests may name.
        memory: what requests read that name none; none: these run plain. It need not be among `memories`.
        retrieval: auto, replica or remote (model_runner.retrieval.Where).
        replica_memory: what each replica may take, e.g. "2GiB".
        replica_keys: how replicas keep keys: f32, f16, bf16 or int8.
        first_pass: how a replica on a CPU is searched.
        max_staleness_s: lookups of a replica that may be older fall back.
        timeout_s: longest lookup of one token in the sidecar.
        ca_file, cert_file, key_file, token_file: as of knnmoe.client.Credentials; else those of the environment.
        strict: a request over HTTP fails afterwards when a lookup of it fell back; it may say so, or not, for itself.

    """

    target: str = "127.0.0.1:50051"
    memories: tuple[str, ...] = ()
    memory: str | None = None
    retrieval: str = "auto"
    replica_memory: str | int | None = None
    replica_keys: KeyDtype = "f32"
    first_pass: str = "auto"
    max_staleness_s: float | None = None
    timeout_s: float = 0.05
    strict: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    token_file: str | None = None

    def __post_init__(self) -> None:
        """Raises BadInput for what cannot be."""
        self.how()
        self.credentials()
        if not self.served:
            raise BadInput(f"{KEY}: no memory is named, expected `memory`, `memories` or both")
        if not isinstance(self.strict, bool):
            raise BadInput(f"{KEY}.strict: got {self.strict!r}, expected true or false")
        if not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise BadInput(f"{KEY}.timeout_s: got {self.timeout_s!r}, expected seconds above 0")

    @property
    def served(self) -> tuple[str, ...]:
        """Every memory that requests may read, the default one first."""
        default = () if self.memory is None else (self.memory,)
        return tuple(dict.fromkeys((*default, *self.memories)))

    def credentials(self) -> Credentials:
        """Of every client of the sidecar. Raises BadInput."""
        files = {name: getattr(self, name) for name in FILES}
        try:
            return Credentials.of_environment(**files)
        except (BadCredentials, TypeError) as error:  # a file name that is no text
            raise BadInput(f"{KEY}: {error}") from error

    def how(self) -> Retrieval:
        """How memories are to be read."""
        size = self.replica_memory
        try:
            return Retrieval(
                self.retrieval,
                parse_bytes(size) if isinstance(size, str) else size,
                self.replica_keys,
                self.first_pass,
                self.max_staleness_s,
            )
        except (ValueError, BadInput) as error:
            raise BadInput(f"{KEY}: {error}") from error


def configured(additional_config: Any) -> Config | None:
    """What vLLM's additional_config says, or else the environment; None: there is no memory to serve.

    Raises BadInput naming what is not known or cannot be.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        text = os.environ.get(ENVIRONMENT)
        if not text:
            return None
        given = parsed(text, ENVIRONMENT)
    return _config(checked(given, [field.name for field in fields(Config)]))


def parsed(text: str, name: str = KEY) -> Any:
    """JSON, of a setting or a field of this name. Raises BadInput for what is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name}: got {text!r}, expected JSON: {error}") from error


def checked(given: Any, known: Sequence[str]) -> dict[str, Any]:
    """A copy of an object with no other fields than these. Raises BadInput naming what is not known."""
    if not isinstance(given, Mapping):
        raise BadInput(f"{KEY}: got {given!r}, expected an object such as {{'memory': 'law'}}")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise BadInput(f"{KEY}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return dict(given)


def _config(values: dict[str, Any]) -> Config:
    memories = values.pop("memories", ())
    names = [values.get("memory") or "-", *memories] if _is_list(memories) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise BadInput(
            f"{KEY}: memory {values.get('memory')!r}, memories {memories!r}: expected a name, and a list of names"
        )
    return Config(memories=tuple(memories), **values)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
