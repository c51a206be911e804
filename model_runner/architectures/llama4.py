"""llama4: the router gives dense scores, zero for the experts that are not chosen.

Source: transformers/models/llama4/modeling_llama4.py, Llama4Router and Llama4TextMoe. The score
multiplies an expert's input, not its output, so a repeated expert adds up in the input's scale.
Every expert runs for every token, whatever the assignment.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from model_runner.architectures.generic import GenericFamily
from model_runner.architectures.site import Assignment, RouterOutput


@dataclass(frozen=True, slots=True)
class Llama4Family(GenericFamily):
    """Attributes: top_k: experts per token, to turn dense scores into k slots."""

    top_k: int = field(kw_only=True)

    def read(self, output: Any) -> RouterOutput:
        """The k scores that are not zero."""
        scores, logits = output
        experts = logits.topk(self.top_k, dim=1).indices  # the router's own call
        return RouterOutput(logits, scores.gather(1, experts), experts)

    def write(self, output: Any, assignment: Assignment) -> Any:
        """Scores that are zero but for the assignment's experts."""
        scores, logits = output
        dense = torch.zeros_like(scores)
        return dense.scatter_add(1, assignment.experts, assignment.weights), logits
