"""A routing memory inside vLLM: a plug-in of the group `vllm.general_plugins`, silent without configuration.

    vllm serve MODEL --additional-config '{"knn_moe": {"target": "127.0.0.1:50051", "memories": ["law", "medicine"]}}'
    client.completions.create(model=MODEL, prompt=..., extra_body={"knn_moe": {"memory": "law"}})

What a worker imports from here needs torch, and never transformers. Options: `config.Config`; of a request:
`request.Wanted`; what is not served: `limits`. How it is hooked up: `plugin`.
"""

from __future__ import annotations


def register() -> None:
    """The entry point, called in each of vLLM's processes, and more than once in some of them."""
    from model_runner.vllm import plugin  # vLLM imports this module also to list what there is

    plugin.install()
