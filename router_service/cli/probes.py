"""What `serve --metrics` listens to."""

from __future__ import annotations

from router_service.cli.listeners import listener, url_of
from router_service.settings import ServiceSettings
from router_service.telemetry.http import Pages, PageServer


class Probes:
    """Metrics and probes of a service, in its own process; without an address there are none."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Takes the address. Raises as listener()."""
        self._host, self._listener = "", None
        self._server: PageServer | None = None
        if settings.metrics is not None:
            self._host, self._listener = listener(
                "--metrics", settings.metrics, insecure=settings.insecure
            )

    def start(self, pages: Pages) -> str | None:
        """Answers; returns where the metrics are, or None."""
        if self._listener is None:
            return None
        self._server = PageServer(self._listener, pages)
        self._server.start()
        return url_of(self._host, self._listener, "/metrics")

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()
