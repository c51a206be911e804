"""Where each family's routers are, and how their assignments are read and replaced."""

from model_runner.architectures.discovery import find_router_sites
from model_runner.architectures.families import Assignment, Family, RouterOutput, RouterSite

__all__ = ["Assignment", "Family", "RouterOutput", "RouterSite", "find_router_sites"]
