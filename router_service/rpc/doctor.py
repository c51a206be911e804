"""The doctor's handler."""

from __future__ import annotations

import grpc
from knnmoe.v1 import doctor_pb2 as pb
from knnmoe.v1 import doctor_pb2_grpc

from router_service import __version__
from router_service.doctor import Finding, Severity, diagnose_store
from router_service.memories.store import MemoryStore

_SEVERITIES = {
    Severity.OK: pb.SEVERITY_OK,
    Severity.WARNING: pb.SEVERITY_WARNING,
    Severity.ERROR: pb.SEVERITY_ERROR,
}


class DoctorService(doctor_pb2_grpc.DoctorServiceServicer):
    """Looks at the service's own store."""

    def __init__(self, store: MemoryStore, min_free_bytes: int | None) -> None:
        self._store, self._min_free_bytes = store, min_free_bytes

    def Diagnose(  # noqa: N802
        self, request: pb.DiagnoseRequest, context: grpc.ServicerContext
    ) -> pb.DiagnoseResponse:
        """Every finding."""
        findings = diagnose_store(self._store, self._min_free_bytes, deep=request.deep)
        return pb.DiagnoseResponse(findings=map(_encoded, findings), service_version=__version__)


def _encoded(finding: Finding) -> pb.Finding:
    return pb.Finding(
        severity=_SEVERITIES[finding.severity],
        check=finding.check,
        what=finding.what,
        remedy=finding.remedy,
    )
