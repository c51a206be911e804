"""What every test starts from."""

import os

from hypothesis import settings

# Timings on a shared machine say nothing about the code.
settings.register_profile("shared_machine", deadline=None)
settings.load_profile("shared_machine")

# One thread: the tests share the machine with the sidecars that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
