"""The characters of tokens, the words around one, and its class."""

from __future__ import annotations

import pytest

from model_runner.token_texts import SNIPPET_BYTES, TokenClass, TokenTexts
from tests.tiny_checkpoint import byte_tokenizer

TOKENIZER = byte_tokenizer()


def texts_of(text: str) -> TokenTexts:
    return TokenTexts.of(TOKENIZER(text)["input_ids"], TOKENIZER)


@pytest.mark.parametrize("text", ["a", "né 例え 😀!\n\n x", "😀", ""])
def test_tokens_that_are_parts_of_a_character_have_the_whole_of_it(text: str) -> None:
    found = texts_of(text)
    assert found.text == text
    by_byte = [character for character in text for _ in character.encode()]
    assert [found.token(n) for n in range(len(found.spans))] == by_byte


def test_a_text_with_the_character_that_stands_for_what_cannot_be_decoded() -> None:
    found = texts_of(" \ufffd\ufffdx")
    assert found.text == " \ufffd\ufffdx"
    assert len(found.spans) == 8


def test_a_character_that_is_cut_off() -> None:
    ids = TOKENIZER("x😀")["input_ids"][:3]
    found = TokenTexts.of(ids, TOKENIZER)
    assert found.text.startswith("x\ufffd")
    assert len(found.spans) == 3


def test_a_snippet_is_bounded_and_marks_its_token() -> None:
    text = "例え" * 100 + "X" + "é" * 100
    found = texts_of(text)
    snippet = found.snippet(len(("例え" * 100).encode()))
    assert snippet.text[snippet.token_start : snippet.token_end] == "X"
    assert snippet.text in text
    assert 100 < len(snippet.text.encode()) <= SNIPPET_BYTES
    for number in range(len(found.spans)):
        assert len(found.snippet(number).text.encode()) <= SNIPPET_BYTES


def test_a_snippet_has_nothing_that_a_service_does_not_store() -> None:
    snippet = texts_of("a\x00b").snippet(1)
    assert snippet.text == "a\u2400b"
    assert snippet[1:] == (1, 2)


def test_a_long_token_is_cut() -> None:
    found = TokenTexts("before" + "-" * 100 + "after", ((0, 6), (6, 106), (106, 111)))
    snippet = found.snippet(1)
    assert snippet.text == "before" + "-" * 32
    assert snippet[1:] == (6, 38)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n    ", "whitespace"),
        (" ", "whitespace"),
        (");\n", "punctuation"),
        (" +=", "punctuation"),
        ("_", "punctuation"),
        (" 1984", "digits"),
        ("４２", "digits"),
        (" the", "words"),
        ("don't", "words"),
        ("self_x1", "words"),
        ("例え", "words"),
        ("e\u0301", "words"),
        ("foo(", "rest"),
        ("3.5", "rest"),
        ("<|end|>", "rest"),
        ("\ufffd", "rest"),
        ("", "rest"),
    ],
)
def test_classes(text: str, expected: str) -> None:
    assert TokenClass.of(text) == expected
