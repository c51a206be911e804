"""What a service shows to Prometheus, read by tests."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from urllib.error import HTTPError

from prometheus_client.parser import text_string_to_metric_families

from tests.sidecar import CALL_TIMEOUT_S, Sidecar

FLAGS = ("--metrics", "127.0.0.1:0")


def url_of(sidecar: Sidecar) -> str:
    """The second line on stdout."""
    assert sidecar.process.stdout is not None
    line = sidecar.process.stdout.readline().decode()
    assert line.startswith("metrics on http://127.0.0.1:"), (line, sidecar.stderr)
    return line.removeprefix("metrics on ").removesuffix("/metrics\n")


def get(url: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_S) as reply:  # noqa: S310
            return reply.status, reply.read().decode()
    except HTTPError as refused:
        return refused.code, refused.read().decode()


class Scraped:
    """What /metrics said at one moment."""

    def __init__(self, url: str) -> None:
        status, text = get(f"{url}/metrics")
        assert status == 200, text
        self.families = {each.name: each for each in text_string_to_metric_families(text)}
        samples = [sample for each in self.families.values() for sample in each.samples]
        self._values = {(each.name, *sorted(each.labels.items())): each.value for each in samples}
        assert len(self._values) == len(samples)  # no series twice

    def __call__(self, name: str, **labels: object) -> float:
        key = (f"knnmoe_{name}", *sorted((k, str(v)) for k, v in labels.items()))
        return self._values[key]

    def of(self, name: str, **labels: str) -> Mapping[str, float]:
        """The series of a name that have these labels, by all labels."""
        return {
            str(key[1:]): value
            for key, value in self._values.items()
            if key[0] == f"knnmoe_{name}" and labels.items() <= dict(key[1:]).items()
        }
