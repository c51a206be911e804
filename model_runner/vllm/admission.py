"""Whether a memory can be read at all, asked of the sidecar when a request for it comes."""

from __future__ import annotations

from knnmoe.client import (
    AdminClient,
    MemoryNotFound,
    ModelMismatch,
    ServiceError,
    require_same_model,
)
from knnmoe.fingerprint import ModelFingerprint

from model_runner.errors import BadInput
from model_runner.vllm.config import Config

# A request waits for it.
TIMEOUT_S = 0.2


class Admission:
    """Of a front end: requests may be admitted from several threads."""

    def __init__(self, config: Config, model: ModelFingerprint) -> None:
        self._client = AdminClient(config.target, TIMEOUT_S, config.credentials())
        self._model = model

    def require(self, memory: str) -> None:
        """Raises BadInput with both sides when the memory is gone, or is another model's.

        A sidecar that does not answer is no refusal: a replica goes on, and other lookups fall back.
        """
        try:
            described = self._client.describe(memory)
            require_same_model(described, self._model.message(), self._client.target)
        except ModelMismatch as error:
            raise BadInput(
                f"knn_moe.memory: got {memory!r}, which was made anew: {error}"
            ) from error
        except MemoryNotFound as error:
            raise BadInput(
                f"knn_moe.memory: got {memory!r}, which this server serves, and it was deleted from the sidecar at "
                f"{self._client.target}"
            ) from error
        except ServiceError:
            return
