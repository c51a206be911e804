from knnmoe.v1 import operations_pb2 as _operations_pb2
from knnmoe.v1 import routing_pb2 as _routing_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SnapshotRef(_message.Message):
    __slots__ = ("name", "path", "memory")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    memory: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., memory: _Optional[str] = ...) -> None: ...

class SnapshotDescription(_message.Message):
    __slots__ = ("memory", "name", "path", "created_unix_ms", "entries", "content_bytes", "write_pause_ms", "service_version", "problem", "remark")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_PAUSE_MS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    REMARK_FIELD_NUMBER: _ClassVar[int]
    memory: str
    name: str
    path: str
    created_unix_ms: int
    entries: int
    content_bytes: int
    write_pause_ms: int
    service_version: str
    problem: str
    remark: str
    def __init__(self, memory: _Optional[str] = ..., name: _Optional[str] = ..., path: _Optional[str] = ..., created_unix_ms: _Optional[int] = ..., entries: _Optional[int] = ..., content_bytes: _Optional[int] = ..., write_pause_ms: _Optional[int] = ..., service_version: _Optional[str] = ..., problem: _Optional[str] = ..., remark: _Optional[str] = ...) -> None: ...

class CreateSnapshotRequest(_message.Message):
    __slots__ = ("memory", "name")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    memory: str
    name: str
    def __init__(self, memory: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class CreateSnapshotResponse(_message.Message):
    __slots__ = ("operation", "snapshot")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    snapshot: SnapshotDescription
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotDescription, _Mapping]] = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ("memory",)
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    memory: str
    def __init__(self, memory: _Optional[str] = ...) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots",)
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[SnapshotDescription]
    def __init__(self, snapshots: _Optional[_Iterable[_Union[SnapshotDescription, _Mapping]]] = ...) -> None: ...

class VerifySnapshotRequest(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ...) -> None: ...

class VerifySnapshotResponse(_message.Message):
    __slots__ = ("operation", "snapshot")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    snapshot: SnapshotDescription
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotDescription, _Mapping]] = ...) -> None: ...

class RestoreSnapshotRequest(_message.Message):
    __slots__ = ("snapshot", "as_memory", "replace")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    AS_MEMORY_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotRef
    as_memory: str
    replace: bool
    def __init__(self, snapshot: _Optional[_Union[SnapshotRef, _Mapping]] = ..., as_memory: _Optional[str] = ..., replace: _Optional[bool] = ...) -> None: ...

class RestoreSnapshotResponse(_message.Message):
    __slots__ = ("operation", "memory", "remark")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    REMARK_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    memory: _routing_pb2.MemoryDescription
    remark: str
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., memory: _Optional[_Union[_routing_pb2.MemoryDescription, _Mapping]] = ..., remark: _Optional[str] = ...) -> None: ...

class PackSnapshotRequest(_message.Message):
    __slots__ = ("memory", "name", "path")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    memory: str
    name: str
    path: str
    def __init__(self, memory: _Optional[str] = ..., name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class PackSnapshotResponse(_message.Message):
    __slots__ = ("operation", "snapshot", "archive")
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ARCHIVE_FIELD_NUMBER: _ClassVar[int]
    operation: _operations_pb2.Operation
    snapshot: SnapshotDescription
    archive: str
    def __init__(self, operation: _Optional[_Union[_operations_pb2.Operation, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotDescription, _Mapping]] = ..., archive: _Optional[str] = ...) -> None: ...

class DeleteSnapshotRequest(_message.Message):
    __slots__ = ("memory", "name")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    memory: str
    name: str
    def __init__(self, memory: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class DeleteSnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: SnapshotDescription
    def __init__(self, snapshot: _Optional[_Union[SnapshotDescription, _Mapping]] = ...) -> None: ...
