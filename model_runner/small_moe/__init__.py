"""A small trained Mixture-of-Experts LM and the texts that show a routing memory at work.

`MODEL_DIR` loads with `AutoModelForCausalLM.from_pretrained`; see MODEL_CARD.md for sources,
licences and measured figures.
"""

from pathlib import Path
from typing import Literal

__all__ = ["DATA_DIR", "MODEL_DIR", "data_file"]

_PACKAGE_DIR = Path(__file__).resolve().parent
MODEL_DIR = _PACKAGE_DIR / "model"
DATA_DIR = _PACKAGE_DIR / "data"


def data_file(
    domain: Literal["general", "shifted"], split: Literal["reference", "dev", "test"]
) -> Path:
    """JSONL file of one shipped split: one `{"text": ..., "id": ...}` object per document."""
    return DATA_DIR / f"{domain}_{split}.jsonl"
