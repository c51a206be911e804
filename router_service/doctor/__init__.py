"""Looks for what is wrong with a data directory or a running service. Reads files only; never opens the engine."""

from router_service.doctor.checks import diagnose_directory, diagnose_store
from router_service.doctor.findings import Finding, Severity

__all__ = ["Finding", "Severity", "diagnose_directory", "diagnose_store"]
