"""What tokens say: the characters of each, the words around one (kept with an entry), and what kind of text it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

# A snippet's UTF-8 bytes, at most: before the token, of it, and after it. What comes after is what the entry is about.
BYTES_BEFORE, BYTES_OF_TOKEN, BYTES_AFTER = 80, 32, 48
SNIPPET_BYTES = BYTES_BEFORE + BYTES_OF_TOKEN + BYTES_AFTER
# A character has 4 bytes at most, and a token one at least.
_TOKENS_PER_CHARACTER = 4
_INCOMPLETE = "\ufffd"
# A service stores no NUL; this is its symbol.
_NUL, _SYMBOL_OF_NUL = "\x00", "\u2400"


class Snippet(NamedTuple):
    """Words around a token, whose characters are [token_start, token_end)."""

    text: str
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The text of n tokens.

    Attributes:
        text: of all of them.
        spans: n times the characters [start, end) of a token. Tokens that are parts of one character have the same:
            the whole character, with what else is in these tokens.

    """

    text: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, token_ids: Sequence[int], tokenizer: Any) -> TokenTexts:
        """Decodes token after token, each with those before it: a decoder may treat the first of a text otherwise."""
        parts, spans, length = list[str](), list[tuple[int, int]](), 0
        context = shown = (
            0  # tokens [context, shown) are in `known`, those from `shown` on in no part yet
        )
        known = ""
        for end in range(1, len(token_ids) + 1):
            new, stop = _decoded(token_ids[context:end], tokenizer)[len(known) :], end
            if new.endswith(_INCOMPLETE) and end < len(token_ids):
                if end - shown < _TOKENS_PER_CHARACTER:
                    continue
                stop = end - 1  # the text has this very character: the last token begins another
                new = _decoded(token_ids[context:stop], tokenizer)[len(known) :]
            spans += [(length, length + len(new))] * (stop - shown)
            parts.append(new)
            length += len(new)
            context, shown = shown, stop
            known = _decoded(token_ids[context:shown], tokenizer)
        return cls("".join(parts).replace(_NUL, _SYMBOL_OF_NUL), tuple(spans))

    def token(self, index: int) -> str:
        """The characters of a token."""
        start, end = self.spans[index]
        return self.text[start:end]

    def snippet(self, index: int) -> Snippet:
        """The words around a token, SNIPPET_BYTES at most; no further than these tokens."""
        start, end = self.spans[index]
        before = _tail(self.text[max(0, start - BYTES_BEFORE) : start], BYTES_BEFORE)
        token = _head(self.text[start : min(end, start + BYTES_OF_TOKEN)], BYTES_OF_TOKEN)
        is_cut = len(token) < end - start
        after = "" if is_cut else _head(self.text[end : end + BYTES_AFTER], BYTES_AFTER)
        return Snippet(before + token + after, len(before), len(before) + len(token))


class TokenClass(StrEnum):
    """What kind of text a token is, its outer whitespace left aside."""

    WHITESPACE = "whitespace"
    PUNCTUATION = "punctuation"
    DIGITS = "digits"
    WORDS = "words"
    REST = "rest"

    @classmethod
    def of(cls, text: str) -> TokenClass:
        """Of a token's characters.

        Words have a letter, and nothing but letters, digits, _, ' and -; punctuation has symbols too. The rest is
        mixed, empty, or what cannot be decoded.
        """
        core = text.strip()
        if not core:
            return cls.WHITESPACE if text else cls.REST
        kinds = {_kind(character) for character in core}
        if kinds == {"N"}:
            return cls.DIGITS
        if _INCOMPLETE not in core and kinds <= {"P", "S"}:
            return cls.PUNCTUATION
        inner = {_kind(character) for character in core if character not in "_'’-"}
        return cls.WORDS if "L" in inner and inner <= {"L", "M", "N"} else cls.REST


def _kind(character: str) -> str:
    return unicodedata.category(character)[0]


def _decoded(token_ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def _head(text: str, most: int) -> str:
    """As many whole characters from the beginning as have `most` UTF-8 bytes."""
    return text.encode(errors="replace")[:most].decode(errors="ignore")


def _tail(text: str, most: int) -> str:
    return text.encode(errors="replace")[-most:].decode(errors="ignore")
