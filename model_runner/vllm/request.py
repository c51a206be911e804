"""What a request says of a memory: `knn_moe` in SamplingParams.extra_args, an object or its JSON.

    SamplingParams(extra_args={"knn_moe": {"memory": "law"}})

The front end checks it and writes down what a worker needs (`Wanted.settled`), so that a worker never meets a name that
it does not serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_runner.errors import BadInput
from model_runner.vllm.config import KEY, Config, checked, parsed

_FIELDS = ("memory", "tag")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Of one request.

    Attributes:
        memory: what it reads; None: it runs plain.
        tag: its lookups are counted under it, for Serving.report; "": under its id.

    """

    memory: str | None
    tag: str = ""

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None, config: Config | None) -> Wanted:
        """Raises BadInput that names what was asked for and what is served."""
        given = None if extra_args is None else extra_args.get(KEY)
        if given is None:
            fields: Mapping[str, Any] = {}
        elif config is None:
            raise BadInput(
                f"{KEY}: got {given!r}, and this server serves no memory; start it with --additional-config "
                f"'{{\"{KEY}\": {{...}}}}'"
            )
        else:
            fields = checked(parsed(given) if isinstance(given, str) else given, _FIELDS)
        if config is None:
            return cls(None)
        wanted = cls(fields.get("memory", config.memory), fields.get("tag", ""))
        wanted._check(config)
        return wanted

    def settled(self, request_id: str) -> dict[str, Any]:
        """For extra_args: what a worker reads with `settled`."""
        return {"memory": self.memory, "request": self.tag or request_id}

    def _check(self, config: Config) -> None:
        if not isinstance(self.tag, str):
            raise BadInput(f"{KEY}.tag: got {self.tag!r}, expected a string")
        if self.memory is not None and self.memory not in config.served:
            raise BadInput(
                f"{KEY}.memory: got {self.memory!r}, and this server serves {', '.join(config.served)}"
            )
        if config.strict and self.memory is not None and not self.tag:
            raise BadInput(
                f"{KEY}: the server is strict, and nobody would look at this request's lookups; ask through "
                "its HTTP API, or give a `tag` and look at knn_moe_report"
            )


def settled(extra_args: Mapping[str, Any] | None) -> tuple[str | None, str]:
    """(memory, request id) of a request that the front end has checked."""
    found = (extra_args or {}).get(KEY)
    if not isinstance(found, Mapping) or "request" not in found:
        return None, ""
    return found["memory"], found["request"]
