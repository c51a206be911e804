"""A tokenizer without files: token ids are UTF-8 bytes."""

from __future__ import annotations


class ByteTokenizer:
    """As much of a transformers tokenizer as texts are cut with; `bos` is put before texts, not before answers."""

    def __init__(self, bos: int | None = None) -> None:
        self._bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        first = [] if self._bos is None or not add_special_tokens else [self._bos]
        return {"input_ids": [*first, *text.encode()]}
