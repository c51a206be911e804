"""Who may do what: tokens, and the peers of a Unix socket."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import socket
import struct
import tomllib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from knnmoe.watched import Watched

from router_service.errors import (
    InvalidField,
    PermissionDenied,
    Unauthenticated,
    shorten,
)
from router_service.rpc.audit import AuditLog, Line, result_of
from router_service.rpc.write_limits import WriteLimits

Request = TypeVar("Request")

log = logging.getLogger(__name__)

_TOKENS = "--tokens"
# How often the file of tokens is looked at, beside when an unknown one comes.
LOOK_EVERY_S = 1.0
_SHORTEST_SECRET = 20
_KEYS = {"name", "role", "memories", "secret", "sha256"}
# Of tokens with the role learn, see WriteLimits.
_LIMITS = {"sources", "max_entries", "max_step"}
# Mode of a Unix socket that is for its own user.
OWN_USER = 0o600
_UCRED = struct.Struct("3i")
_METADATA, _SCHEME = "authorization", "Bearer "
_HEALTH = "/grpc.health."
_PACKAGE = "/knnmoe.v1."
_WITHOUT = "name its file with --token-file or KNNMOE_TOKEN_FILE"


class Role(IntEnum):
    """Each may do what those before it may."""

    READ = 1  # what changes nothing
    LEARN = 2  # and adds entries
    ADMIN = 3


# Every other call is for ADMIN.
_ROLES = {
    Role.READ: (
        "RoutingService/Describe",
        "RoutingService/Route",
        "RoutingService/RouteStream",
        "ReplicationService/Replicate",
        "ReplicationService/ReportHits",
        "MemoryAdminService/ListMemories",
        "MemoryAdminService/DescribeMemory",
        "MemoryAdminService/Count",
        "MemoryAdminService/Export",
        "MemoryAdminService/Stats",
        "MemoryAdminService/ListSources",
        "MemoryAdminService/ExplainEntry",
        "MemoryAdminService/RecentLookups",
        "OperationService/ListOperations",
        "OperationService/GetOperation",
        "SnapshotService/ListSnapshots",
    ),
    Role.LEARN: ("MemoryAdminService/Upsert",),
}
ROLE_OF = {f"{_PACKAGE}{call}": role for role, calls in _ROLES.items() for call in calls}
# The fields that name memories, where it is not `memory` alone.
_MEMORIES = {
    f"{_PACKAGE}MemoryAdminService/CreateMemory": ("name",),
    f"{_PACKAGE}MemoryAdminService/ReplaceMemory": ("memory", "by"),
    f"{_PACKAGE}SnapshotService/VerifySnapshot": ("snapshot.memory",),
    f"{_PACKAGE}SnapshotService/RestoreSnapshot": ("snapshot.memory", "as_memory"),
}


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows. `memories`: None for all; `digest`: SHA-256 of the token; `limits`: of what it writes."""

    name: str
    role: Role
    memories: frozenset[str] | None
    digest: bytes = field(repr=False)
    limits: WriteLimits | None = None


def read_tokens(path: Path) -> tuple[Grant, ...]:
    """The tokens of a TOML file, see docs/security.md. Raises InvalidField, which quotes no secret."""
    try:
        document = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise InvalidField(_TOKENS, str(path), f"a file ({error.strerror})") from error
    except ValueError as error:
        raise InvalidField(_TOKENS, str(path), f"TOML ({error})") from None
    tokens = document.get("token")
    if set(document) != {"token"} or not isinstance(tokens, list):
        raise InvalidField(_TOKENS, str(path), "[[token]] tables and nothing else")
    grants = tuple(_grant(f"{path}: token {n}", token) for n, token in enumerate(tokens, 1))
    for what, each in (("names", "name"), ("secrets", "digest")):
        if len({getattr(grant, each) for grant in grants}) < len(grants):
            raise InvalidField(_TOKENS, str(path), f"{what} that are all different")
    return grants


def _grant(place: str, token: Any) -> Grant:
    def require(fits: bool, key: str, expected: str) -> None:
        if not fits:
            raise InvalidField(_TOKENS, f"{place}: {key}", expected)

    require(isinstance(token, dict), "this", "a table")
    keys = _KEYS | _LIMITS
    require(set(token) <= keys, "its keys", f"no others than {', '.join(sorted(keys))}")
    name, role, memories = token.get("name"), token.get("role"), token.get("memories")
    require(isinstance(name, str) and bool(name), "name", "a name for the log")
    roles = {each.name.lower(): each for each in Role}
    require(isinstance(role, str) and role in roles, "role", "read, learn or admin")
    is_list = isinstance(memories, list) and all(isinstance(each, str) for each in memories)
    require(memories == "all" or (is_list and bool(memories)), "memories", '"all" or ["NAME", ...]')
    digest, limits = _digest_of(token, require), _limits_of(token, require)
    bound = None if memories == "all" else frozenset(memories)
    return Grant(name, roles[role], bound, digest, limits)


def _limits_of(
    token: Mapping[str, Any], require: Callable[[bool, str, str], None]
) -> WriteLimits | None:
    given = {key: token[key] for key in sorted(_LIMITS & set(token))}
    if not given:
        return None
    require(token["role"] == "learn", next(iter(given)), 'the role "learn", which it bounds')
    sources = given.get("sources", [])
    named = isinstance(sources, list) and all(isinstance(s, str) and s for s in sources)
    require(named and ("sources" not in given or bool(sources)), "sources", '["SOURCE", ...]')
    most, step = given.get("max_entries"), given.get("max_step")
    counts = isinstance(most, int) and not isinstance(most, bool) and most > 0
    require(most is None or (counts and bool(sources)), "max_entries", "1 or more, with `sources`")
    length = isinstance(step, int | float) and not isinstance(step, bool)
    require(step is None or (length and 0 < step < math.inf), "max_step", "a number above 0")
    return WriteLimits(token["name"], frozenset(sources), most, step)


def _digest_of(token: Mapping[str, Any], require: Callable[[bool, str, str], None]) -> bytes:
    plain, hashed = token.get("secret"), token.get("sha256")
    require((plain is None) != (hashed is None), "secret", "either `secret` or `sha256`")
    if plain is None:
        is_hex = isinstance(hashed, str) and re.fullmatch("[0-9a-fA-F]{64}", hashed) is not None
        require(is_hex, "sha256", "64 hex digits")
        return bytes.fromhex(str(hashed))
    long = isinstance(plain, str) and len(plain) >= _SHORTEST_SECRET
    require(
        long and plain.isascii() and plain.isprintable() and " " not in plain,
        "secret",
        f"{_SHORTEST_SECRET} or more printable ASCII characters, e.g. of `openssl rand -hex 32`",
    )
    return _digest(plain)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Authority:
    """Decides for one service. Without a file of tokens whoever reaches the service may do everything."""

    def __init__(
        self,
        tokens: Path | None,
        memory_of_operation: Callable[[str], str] = lambda _: "",
        anyone: str = "",
    ) -> None:
        """`anyone`: the name in the audit log where there are no tokens.

        Raises InvalidField when the file cannot be used; what it is later on is said in the log, see Watched.
        """
        self._memory_of_operation = memory_of_operation
        self.audit = AuditLog()
        # Of calls that write entries, by their contexts: what bounds the message that came last.
        self.writing: dict[Any, WriteLimits | None] = {}
        self._anyone = Grant(anyone, Role.ADMIN, None, b"")
        self._own = ""
        self._own_grants: tuple[Grant, ...] = ()
        self._tokens: Watched[tuple[Grant, ...]] | None = None
        if tokens is not None:
            self._tokens = Watched(
                [tokens],
                lambda: read_tokens(tokens),
                every_s=LOOK_EVERY_S,
                secret=[tokens],
                unusable=(InvalidField,),
            )

    @property
    def asks(self) -> bool:
        """Whether calls need a token."""
        return self._tokens is not None

    def own_token(self) -> str:
        """One that reads all memories, for what the service itself starts; it is kept nowhere."""
        if not self._own:
            self._own = secrets.token_urlsafe(32)
            self._own_grants = (Grant("the service", Role.READ, None, _digest(self._own)),)
        return self._own

    def begun(self, method: str, context: Any) -> Call:
        """A call that has come over gRPC."""
        token = None
        for key, value in context.invocation_metadata() if self.asks else ():
            if key == _METADATA and value.startswith(_SCHEME):
                token = value.removeprefix(_SCHEME)
        return Call(self, method, token, context.peer, context)

    def call(self, method: str, token: str | None, peer: Callable[[], str]) -> Call:
        """A call that has come with this token."""
        return Call(self, method, token, peer)

    def limits_of(self, context: Any) -> WriteLimits | None:
        """What bounds the message that a call which writes entries is at; None: nothing does."""
        return self.writing[context]

    def grant(self, digest: bytes | None) -> Grant:
        """What the token of this digest allows now. Raises Unauthenticated."""
        if self._tokens is None:
            return self._anyone
        if digest is None:
            raise Unauthenticated(f"this service asks for a token: {_WITHOUT}")
        found = self._among(self._tokens.get(), digest) or self._among(
            self._tokens.get(look=True), digest
        )
        if found is None:
            raise Unauthenticated(
                f"the token is none that this service knows, or was withdrawn: {_WITHOUT}"
            )
        return found

    def _among(self, grants: tuple[Grant, ...], digest: bytes) -> Grant | None:
        """In a time that says nothing of which one it is, or how near."""
        found = None
        for grant in (*grants, *self._own_grants):
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found

    def memories_of(self, method: str, request: Any) -> tuple[str, ...]:
        """The memories that a request is about; () where it is about the service."""
        if method in _OF_OPERATIONS:
            return (self._memory_of_operation(request.id),)
        names = []
        for path in _MEMORIES.get(method, ("memory",)):
            value = request
            for part in path.split("."):
                value = getattr(value, part, "")
            names.append(value)
        return tuple(names) if all(names) else ()


_OF_OPERATIONS = {
    f"{_PACKAGE}OperationService/{name}" for name in ("GetOperation", "CancelOperation")
}


class Call(AbstractContextManager["Call"]):
    """One call's right. It is looked at for each message, so that a stream ends when its token is withdrawn.

    As a context manager it writes the line of the audit log.
    """

    def __init__(
        self,
        authority: Authority,
        method: str,
        token: str | None,
        peer: Callable[[], str],
        context: Any = None,
    ) -> None:
        self._authority, self._method, self._peer = authority, method, peer
        self._context = context
        self._role = ROLE_OF.get(method, Role.ADMIN)
        self._digest = None if token is None else _digest(token)
        self._grant: Grant | None = None
        self._memories: tuple[str, ...] = ()
        self._free = method.startswith(_HEALTH)
        # A message was let through; and another was asked for, or an answer is there, so that it was dealt with.
        self._passed, self._worked = False, False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._authority.writing.pop(self._context, None)
        if self._free:
            return
        refused = isinstance(error, Unauthenticated | PermissionDenied)
        changes = self._role > Role.READ
        if changes and (self._worked or (self._passed and not refused)):
            self._authority.audit.changed(self._line(error))
        elif changes or refused:
            self._authority.audit.refused(self._line(error))

    def require(self, request: Request) -> Request:
        """The request, where the caller may make it. Raises Unauthenticated, PermissionDenied."""
        if self._free:
            return request
        self._worked = self._passed
        self._grant = grant = self._authority.grant(self._digest)
        self._memories = self._authority.memories_of(self._method, request)
        if grant.role < self._role:
            raise self._denied(grant, f"the role {self._role.name.lower()}")
        if grant.memories is not None and not (
            self._memories and grant.memories.issuperset(self._memories)
        ):
            about = " and ".join(map(shorten, self._memories)) or "all memories"
            raise self._denied(grant, f"a token for {about}")
        if self._role is Role.LEARN:
            self._authority.writing[self._context] = grant.limits
        self._passed = True
        return request

    def goes_on(self) -> None:
        """Between the answers of a stream. Raises Unauthenticated when the token was withdrawn meanwhile."""
        if not self._free:
            self._worked = self._passed
            self._grant = self._authority.grant(self._digest)

    def _line(self, error: BaseException | None) -> Line:
        who = "" if self._grant is None else self._grant.name
        call = self._method.removeprefix(_PACKAGE)
        return Line(who, self._peer(), call, self._memories, result_of(error))

    def _denied(self, grant: Grant, needed: str) -> PermissionDenied:
        bound = "all memories" if grant.memories is None else ", ".join(sorted(grant.memories))
        call = self._method.removeprefix(_PACKAGE)
        return PermissionDenied(
            f"{call} needs {needed}; token {grant.name!r} has the role {grant.role.name.lower()} for {shorten(bound)}"
        )


def require_own_user(connection: socket.socket) -> None:
    """Raises PermissionDenied unless the process at the other end is of this process's user, or root."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    if uid not in (0, os.getuid()):
        raise PermissionDenied(
            f"this socket is for user {os.getuid()}, and the client is of user {uid}; see --socket-mode"
        )
