"""What a worker of vLLM imports: torch, and never transformers."""

import subprocess
import sys


def test_the_plugin_runs_where_transformers_cannot_be_imported() -> None:
    blocked = (
        "import sys; sys.modules.update(transformers=None, accelerate=None);"
        "import model_runner.vllm, model_runner.vllm.config, model_runner.vllm.request, model_runner.vllm.op;"
        "import model_runner.vllm.memory, model_runner.vllm.batch, model_runner.vllm.plugin;"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", blocked], check=True)
