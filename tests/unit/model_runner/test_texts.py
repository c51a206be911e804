"""Windows: loss masks, prompts that are never closed, conversations, and batches."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from knnmoe.client import ExampleRef

from model_runner.errors import BadInput
from model_runner.text_files import Example
from model_runner.texts import Window, batched, cut_windows, distinct, drawn, open_ids, prompt_ids
from tests.tiny_checkpoint import END, byte_tokenizer, closing_tokenizer
from tests.unit.model_runner.byte_tokenizer import ByteTokenizer

USER, ANSWER = "u", "a"


def decoded(window: Window) -> str:
    return bytes(window.token_ids).decode()


def test_windows_never_cross_examples() -> None:
    examples = [
        Example(ExampleRef("s", "a"), "abcdefgh" * 2 + "xy"),
        Example(ExampleRef("s", "b"), "0123456789"),
    ]
    windows = cut_windows(examples, ByteTokenizer(), 8)
    assert [(w.ref.example, w.offset, decoded(w)) for w in windows] == [
        ("a", 0, "abcdefgh"),
        ("a", 8, "abcdefgh"),
        ("a", 16, "xy"),
        ("b", 0, "01234567"),
        ("b", 8, "89"),
    ]
    assert all(w.target_at == tuple(range(1, len(w.token_ids))) for w in windows)


def test_scraps_are_left_out_but_short_examples_are_not() -> None:
    examples = [
        Example(ExampleRef("s", "long"), "x" * 36),
        Example(ExampleRef("s", "short"), "ab"),
        Example(ExampleRef("s", "one token"), "a"),
    ]
    windows = cut_windows(examples, ByteTokenizer(), 32)
    assert [(w.ref.example, len(w.token_ids)) for w in windows] == [("long", 32), ("short", 2)]


def test_an_answer_alone_has_a_loss() -> None:
    example = Example(ExampleRef("s", "1"), "ask: ", "yes")
    (window,) = cut_windows([example], ByteTokenizer(bos=0), 32)
    assert decoded(window) == "\x00ask: yes"
    assert (window.first_target, window.targets, window.offset) == (6, 3, 0)


def test_a_long_prompt_loses_its_beginning() -> None:
    (window,) = cut_windows(
        [Example(ExampleRef("s", "1"), "0123456789", "yes")], ByteTokenizer(), 8
    )
    assert decoded(window) == "56789yes"
    assert (window.first_target, window.offset) == (5, 5)


def test_a_long_answer_goes_on_in_the_next_window() -> None:
    windows = cut_windows([Example(ExampleRef("s", "1"), "ask", "0123456789")], ByteTokenizer(), 8)
    assert [decoded(w) for w in windows] == ["k0123456", "23456789"]
    assert [w.target_at for w in windows] == [(1, 2, 3, 4, 5, 6, 7), (5, 6, 7)]
    assert [w.offset for w in windows] == [2, 5]


def test_no_prompt_and_no_answer() -> None:
    no_prompt = Example(ExampleRef("s", "1"), "", "yes")
    (window,) = cut_windows([no_prompt], ByteTokenizer(), 8)
    assert (decoded(window), window.first_target) == ("yes", 1)
    with pytest.raises(BadInput, match="none with 2 tokens of text, or with an answer"):
        cut_windows([Example(ExampleRef("s", "1"), "ask", "")], ByteTokenizer(), 8)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_window_has_two_tokens(length: int) -> None:
    with pytest.raises(BadInput, match=f"got {length}, expected 2 or more"):
        cut_windows([], ByteTokenizer(), length)


@given(st.text(max_size=200), st.integers(2, 40))
def test_windows_are_the_text_in_order(text: str, length: int) -> None:
    tokens = text.encode()
    example = Example(ExampleRef("s", "1"), text)
    if len(tokens) < 2:
        return
    windows = cut_windows([example], ByteTokenizer(), length)
    for window in windows:
        part = tokens[window.offset : window.offset + length]
        assert bytes(window.token_ids) == part
    covered = sum(len(w.token_ids) for w in windows)
    assert len(tokens) - covered < max(2, length // 4)


@given(st.lists(st.integers(2, 9), max_size=20), st.integers(1, 6))
def test_batches_hold_every_window_longest_first(lengths: list[int], size: int) -> None:
    windows = [
        Window(ExampleRef("s", str(n)), (0,) * length, tuple(range(1, length)), 0)
        for n, length in enumerate(lengths)
    ]
    groups = list(batched(windows, size))
    flat = [w for group in groups for w in group]
    assert sorted(flat, key=lambda w: int(w.ref.example)) == windows
    assert [len(w.token_ids) for w in flat] == sorted(lengths, reverse=True)
    assert all(len(group) == size for group in groups[:-1])


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(2, 40),
)
def test_every_token_of_a_turn_is_a_target_once(sizes: list[tuple[int, int]], length: int) -> None:
    """Turns of the user and the assistant, in characters."""
    turns = [(USER * asked, ANSWER * answered) for asked, answered in sizes]
    messages = tuple(
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    windows = cut_windows([Example(ExampleRef("s", "1"), "", messages=messages)], tokenizer, length)
    text = "".join(asked + answered for asked, answered in turns)
    every = [w.offset + at for w in windows for at in w.target_at]
    assert every == [at for at, character in enumerate(text) if character == ANSWER]
    for window in windows:
        end = window.offset + len(window.token_ids)
        assert tokenizer.decode(window.token_ids) == text[window.offset : end]
        assert len(window.token_ids) <= length
        # Half a window is before it, or the beginning, or as much as the turn leaves room for.
        assert 0 in (window.offset, max(0, length // 2 - max(window.first_target, window.targets)))


@pytest.mark.parametrize(
    ("template", "before"), [(f"$A {END}", []), (f"{END} $A {END} {END}", [0]), (f"{END} $A", [0])]
)
def test_what_a_tokenizer_appends_closes_no_prompt(template: str, before: list[int]) -> None:
    closing, plain = closing_tokenizer(template), byte_tokenizer()
    assert len(closing("text")["input_ids"]) > len(plain("text")["input_ids"])
    for text in ("", "text", "a"):
        assert open_ids(text, closing) == before + plain(text)["input_ids"]
    rows = [
        Example(ExampleRef("s", "1"), "ask", "yes"),
        Example(ExampleRef("s", "2"), "a document"),
    ]
    asked, document = cut_windows(rows, closing, 64)
    assert list(asked.token_ids) == before + plain("askyes")["input_ids"]
    assert list(document.token_ids) == before + plain("a document")["input_ids"]
    assert asked.first_target == len(before) + 3


CHATS = {
    # As ChatML: turns end with a special token.
    "end of turn": (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<|end|>\n{% endfor %}",
        ["Moses<|end|>", "Aaron<|end|>"],
    ),
    "bare": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        [" Moses", "Aaron"],
    ),
    # As Qwen3: the last turn begins with an empty thought, earlier ones do not.
    "thoughts": (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}",
        [" Moses<|end|>", "Aaron<|end|>"],
    ),
    # As gpt-oss: the last turn ends otherwise.
    "return": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if loop.last %}<|end|>{% else %}.{% endif %}{% endfor %}",
        [" Moses", "Aaron<|end|>"],
    ),
}
TURNS = (
    {"role": "system", "content": "Aaron"},
    {"role": "user", "content": "Who led them out?"},
    {"role": "assistant", "content": " Moses"},
    {"role": "user", "content": "Who spoke for him? Moses?"},
    {"role": "assistant", "content": "Aaron"},
)


@pytest.mark.parametrize("chat", CHATS)
def test_the_loss_counts_on_the_assistants_turns(chat: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, spoken = CHATS[chat]
    example = Example(ExampleRef("s", "1"), "", messages=TURNS)
    (window,) = cut_windows([example], tokenizer, 500)
    whole = tokenizer.apply_chat_template([dict(t) for t in TURNS], tokenize=False)
    assert whole.startswith(tokenizer.decode(window.token_ids))
    counted = "".join(tokenizer.decode(window.token_ids[at]) for at in window.target_at)
    assert counted == "".join(spoken)
    before_last = tokenizer.decode(prompt_ids(example, tokenizer))
    assert before_last == whole[: whole.rindex("Aaron")]


def test_a_conversation_that_a_template_does_not_take() -> None:
    tokenizer = byte_tokenizer()
    example = Example(ExampleRef("s", "7"), "", messages=TURNS)
    with pytest.raises(BadInput, match="example 7: has `messages`, and the model's tokenizer has"):
        cut_windows([example], tokenizer, 64)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(BadInput, match=r"chat template refuses it .*no system turns"):
        cut_windows([example], tokenizer, 64)


def test_what_is_too_short_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [("one", None), ("x", None), ("ask", ""), ("", None)]
    examples = [Example(ExampleRef("s.txt", str(n)), *row) for n, row in enumerate(rows)]
    with caplog.at_level(logging.WARNING):
        assert len(cut_windows(examples, ByteTokenizer(), 8)) == 1
    said = "s.txt: 3 of 4 examples left out: 2 shorter than 2 tokens, 1 without an answer"
    assert [record.message for record in caplog.records] == [said]


def test_windows_that_repeat_others() -> None:
    one, other = (Example(ExampleRef("s", n), "text " * 5) for n in ("1", "2"))
    windows = cut_windows([one, other, one], ByteTokenizer(), 8)
    assert distinct(windows) == cut_windows([one, other], ByteTokenizer(), 8)


def of_lengths(*lengths: int) -> list[Window]:
    """Documents of so many windows."""
    return [
        Window(ExampleRef("s", str(document)), (1, 2), (1,), offset)
        for document, length in enumerate(lengths)
        for offset in range(length)
    ]


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ((3, 3), None, "00 01 02 10 11 12"),
        ((3, 3), 9, "00 01 02 10 11 12"),
        ((9, 1, 1), 3, "00 10 20"),
        ((9, 1, 1), 5, "00 03 06 10 20"),
        ((4, 4), 4, "00 02 10 12"),
        ((1, 1, 1, 1), 2, "00 20"),
        ((1, 1, 1, 1), 3, "00 10 20"),
    ],
)
def test_windows_are_drawn_of_as_many_documents_as_can_be(
    lengths: tuple[int, ...], most: int | None, expected: str
) -> None:
    windows = drawn(of_lengths(*lengths), most)
    assert " ".join(f"{w.ref.example}{w.offset}" for w in windows) == expected
