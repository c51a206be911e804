"""longcat_flash: its experts cannot take a single slot per token.

Source: transformers/models/longcat_flash/modeling_longcat_flash.py, LongcatFlashExperts.forward
squeezes the slot axis away when k' = 1 and then unpacks two axes. Its zero-computation experts
(identity maps) are ordinary experts here, numbered after the others.
"""

from typing import Any

import torch

from model_runner.architectures.generic import GenericFamily
from model_runner.architectures.site import Assignment


class LongcatFlashFamily(GenericFamily):
    """The generic family, with a second slot of weight zero where there is only one."""

    def write(self, output: Any, assignment: Assignment) -> Any:
        """As the generic family, with at least two slots."""
        weights, experts = assignment.weights, assignment.experts
        if experts.shape[1] == 1:
            weights = torch.cat([weights, torch.zeros_like(weights)], -1)
            experts = torch.cat([experts, experts], -1)
        return (output[0], weights, experts, *output[3:])
