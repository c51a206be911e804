"""jetmoe: the router gives token-expert pairs sorted by expert.

Source: transformers/models/jetmoe/modeling_jetmoe.py, JetMoeTopKGating and JetMoeMoE. Only the
MLP half is served: the attention half (JetMoeMoA) fixes the number of experts per token in the
shape of its queries.
"""

from typing import Any

import torch

from model_runner.architectures.generic import GenericFamily
from model_runner.architectures.site import Assignment, RouterOutput


class JetMoeFamily(GenericFamily):
    """Output: `(pair_order [T*k], token [T*k], weight [T*k], pairs per expert, logits [T, N])`."""

    def read(self, output: Any) -> RouterOutput:
        """The pairs in token order again."""
        pair_order, _, sorted_weights, pairs_per_expert, logits = output
        tokens = logits.shape[0]
        expert_ids = torch.arange(len(pairs_per_expert), device=logits.device)
        counts = torch.tensor(pairs_per_expert, device=logits.device)
        sorted_experts = expert_ids.repeat_interleave(counts)
        weights = torch.empty_like(sorted_weights).scatter(0, pair_order, sorted_weights)
        experts = torch.empty_like(sorted_experts).scatter(0, pair_order, sorted_experts)
        return RouterOutput(logits, weights.reshape(tokens, -1), experts.reshape(tokens, -1))

    def write(self, output: Any, assignment: Assignment) -> Any:
        """The pairs of another assignment, sorted by expert."""
        logits, slots = output[-1], assignment.experts.shape[1]
        flat_experts = assignment.experts.flatten()
        pair_order = flat_experts.sort(0)[1]  # the router's own call, so that ties fall alike
        token = pair_order.div(slots, rounding_mode="trunc")
        pairs_per_expert = flat_experts.bincount(minlength=len(output[3])).tolist()
        return pair_order, token, assignment.weights.flatten()[pair_order], pairs_per_expert, logits
