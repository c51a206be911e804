"""Texts cut into windows of tokens: reference, dev and test data in one form; their batches and their loss.

A prompt is never closed, and a conversation is what the model's own chat template makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from knnmoe.client import ExampleRef
from torch import Tensor

from model_runner.errors import BadInput
from model_runner.progress import Progress
from model_runner.text_files import ASSISTANT, Example, read_examples, say_left_out

# What a text leaves over after its full windows is left out below this share of one.
SHORTEST_WINDOW_SHARE = 0.25
# Stands in for a turn to find where a chat template puts it.
_MARK = "\ue000"

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model reads in one go.

    Attributes:
        token_ids: n of them.
        target_at: indices of the tokens whose loss counts, rising, each 1 or more.
        offset: position of token 0 within the example.
        identity, name: as in Example.

    """

    ref: ExampleRef
    token_ids: tuple[int, ...]
    target_at: tuple[int, ...]
    offset: int
    identity: str = ""
    name: str = ""

    @property
    def targets(self) -> int:
        """Tokens whose loss counts."""
        return len(self.target_at)

    @property
    def first_target(self) -> int:
        """Index of the first of them."""
        return self.target_at[0]


def cut_windows(
    examples: Iterable[Example], tokenizer: Any, length: int, progress: Progress | None = None
) -> list[Window]:
    """Windows of up to `length` tokens, in order; they never cross examples.

    Special tokens that the tokenizer puts before a text stay, those that it appends go: what follows, an answer or a
    continuation, does not come after the end of a text. Examples that give no window are left out; a warning says how
    many. Raises BadInput when none results, or a conversation cannot be rendered.
    """
    if length < 2:
        raise BadInput(f"window length: got {length}, expected 2 or more tokens")
    every, windows, left_out = list(examples), list[Window](), Counter[str]()
    cutter = _Cutter(tokenizer, length)
    progress = progress or Progress(quiet=True)
    for example in progress.track(every, "reading", "examples"):
        found = list(cutter.windows_of(example))
        windows += found
        if not found:
            left_out[_lacking(example)] += 1
    if not windows:
        raise BadInput(
            f"{len(every)} example(s), none with 2 tokens of text, or with an answer"
            if every
            else "holds no text"
        )
    say_left_out(every[0].ref.source, left_out, len(every))
    return windows


def _lacking(example: Example) -> str:
    if example.messages:
        return "without a turn of the assistant"
    return "shorter than 2 tokens" if example.answer is None else "without an answer"


def read_windows(
    path: Path, tokenizer: Any, length: int, progress: Progress | None = None
) -> list[Window]:
    """read_examples, then cut_windows; errors name the file."""
    try:
        return cut_windows(read_examples(path), tokenizer, length, progress)
    except BadInput as error:
        raise BadInput(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def distinct(windows: Iterable[Window]) -> list[Window]:
    """Without those that say again what an earlier one says: rows of the same text and no id."""
    first: dict[tuple[ExampleRef, str, int], Window] = {}
    for window in windows:
        first.setdefault((window.ref, window.identity, window.offset), window)
    return list(first.values())


def drawn(windows: Sequence[Window], most: int | None) -> list[Window]:
    """At most so many of them, in order: as many of each example as can be, evenly spaced; None: all."""
    by_example: dict[ExampleRef, list[Window]] = {}
    for window in windows:
        by_example.setdefault(window.ref, []).append(window)
    groups, left = list(by_example.values()), len(windows) if most is None else most
    quotas = [0] * len(groups)
    while left > 0 and (more := [n for n, group in enumerate(groups) if len(group) > quotas[n]]):
        turn = _evenly(more, left)
        for n in turn:
            quotas[n] += 1
        left -= len(turn)
    kept = {id(w) for n, group in enumerate(groups) for w in _evenly(group, quotas[n])}
    return [window for window in windows if id(window) in kept]


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    taken = min(most, len(items))
    return [items[n * len(items) // taken] for n in range(taken)]


def open_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that goes on: without what the tokenizer appends, such as an end of text."""
    return _Cutter(tokenizer).open_ids(text)


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of what comes before the answer, or before the assistant's last turn, or where that begins.

    Raises BadInput.
    """
    return _Cutter(tokenizer).prompt_ids(example)


class _Cutter:
    """Cuts examples into windows of up to `length` tokens of a tokenizer."""

    def __init__(self, tokenizer: Any, length: int = 0) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._appended = _appended(tokenizer)

    def open_ids(self, text: str) -> list[int]:
        ids = self._tokenizer(text)["input_ids"]
        return list(ids[: len(ids) - self._appended])

    def prompt_ids(self, example: Example) -> list[int]:
        if not example.messages:
            return self.open_ids(example.text)
        if example.messages[-1]["role"] != ASSISTANT:
            opened = _awaiting(example, self._tokenizer)
            return list(self._tokenizer(opened, add_special_tokens=False)["input_ids"])
        ids, turns = _conversation(example, self._tokenizer)
        return ids[: turns[-1][0]] if turns else ids

    def windows_of(self, example: Example) -> Iterator[Window]:
        if example.messages:
            yield from self._around(example, *_conversation(example, self._tokenizer))
        elif example.answer is not None:
            ids = self.open_ids(example.text)
            answer = self._tokenizer(example.answer, add_special_tokens=False)["input_ids"]
            yield from self._around(example, [*ids, *answer], [(len(ids), len(ids) + len(answer))])
        else:
            yield from self._side_by_side(example, self.open_ids(example.text))

    def _side_by_side(self, example: Example, ids: Sequence[int]) -> Iterator[Window]:
        """Of a document, all of whose tokens count."""
        shortest_rest = max(2, int(self._length * SHORTEST_WINDOW_SHARE))
        for start in range(0, len(ids), self._length):
            stop = min(start + self._length, len(ids))
            if stop - start >= (shortest_rest if start else 2):
                yield _window(example, ids, start, stop, range(start + 1, stop))

    def _around(
        self, example: Example, ids: Sequence[int], turns: Sequence[tuple[int, int]]
    ) -> Iterator[Window]:
        """Of the tokens [first, end) of turns, each in one window, with half a window before it where there is as much.

        One turn that fits ends its window: the beginning of what is before it is cut off. One that does not goes on in
        the next.
        """
        length = self._length
        rest = [(max(1, first), end) for first, end in turns if end > max(1, first)]
        while rest:
            first, end = rest[0]
            start = max(0, first - length // 2)
            if end > start + length:
                start = max(0, min(first - 1, end - length))
            stop = max((end for _, end in rest if end <= start + length), default=start + length)
            targets = [at for first, end in rest for at in range(first, min(end, stop))]
            yield _window(example, ids, max(0, stop - length), stop, targets)
            rest = [(max(first, stop), end) for first, end in rest if end > stop]


def _window(
    example: Example, ids: Sequence[int], start: int, stop: int, targets: Iterable[int]
) -> Window:
    """Of the tokens [start, stop) of an example; targets: positions in the example."""
    return Window(
        example.ref,
        tuple(ids[start:stop]),
        tuple(at - start for at in targets),
        start,
        example.identity,
        example.name,
    )


def _appended(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts after a text: those after the text's own last one."""
    [*_, last] = tokenizer("a", add_special_tokens=False)["input_ids"]
    closed = list(tokenizer("a")["input_ids"])
    return closed[::-1].index(last) if last in closed else 0


def require_chat_template(tokenizer: Any, what: str, otherwise: str) -> None:
    """Raises BadInput, which says what needs a chat template and what there is to do, where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadInput(
            f"{what}, and the model's tokenizer has no chat template to render them with; "
            f"{otherwise}, or a model with a chat template (often the one named Instruct or Chat)"
        )


def _where(example: Example) -> str:
    return f"example {example.name or example.ref.example}"


def _awaiting(example: Example, tokenizer: Any) -> str:
    """A conversation that ends with another's turn, as text up to where the assistant's begins."""
    where, messages = _where(example), example.messages
    require_chat_template(tokenizer, f"{where}: has `messages`", "give `prompt` and `answer`")
    whole = _render(messages, tokenizer, where)
    opened = _render(messages, tokenizer, where, add_generation_prompt=True)
    if opened != whole:
        return opened
    # A template that knows no such prompt shows in a turn how it begins.
    marked = _render([*messages, {"role": ASSISTANT, "content": _MARK}], tokenizer, where)
    return marked[: marked.index(_MARK)] if _MARK in marked else whole


def _render(turns: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, **options: Any) -> str:
    from jinja2 import TemplateError

    as_dicts = [dict(turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(as_dicts, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError) as error:
        raise BadInput(f"{where}: the model's chat template refuses it ({error})") from error


def _conversation(example: Example, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids as the model's chat template renders it, and the assistant's turns [first, end) with what ends them."""
    where = _where(example)
    require_chat_template(tokenizer, f"{where}: has `messages`", "give `prompt` and `answer`")
    if not tokenizer.is_fast:
        raise BadInput(
            f"{where}: has `messages`, which need a tokenizer that tells where its tokens are (tokenizer.json); "
            "give `prompt` and `answer`"
        )
    whole, spans = _rendered(example.messages, tokenizer, where)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    turns = []
    for first, end in spans:
        at = [n for n, (a, b) in enumerate(offsets) if a < end and b > first]
        turns += [(at[0], at[-1] + 1)] if at else []
    return list(encoded["input_ids"]), turns


def _rendered(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and which characters are the assistant's: those that change when the turn does.

    Templates may write a turn differently when others follow, so that no part of a conversation is its beginning.
    """

    def render(turns: Sequence[Mapping[str, Any]]) -> str:
        return _render(turns, tokenizer, where)

    whole, spans = render(messages), list[tuple[int, int]]()
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for number, turn in enumerate(messages):
        if turn["role"] != ASSISTANT or turn.get("weight", 1) == 0:
            continue
        marked = render([*messages[:number], {**turn, "content": _MARK}, *messages[number + 1 :]])
        first = _alike(whole, marked)
        same = _alike(whole[first:][::-1], marked[first:][::-1])
        end = len(whole) - same
        if end > first:
            rest = whole[end:].lstrip()
            closing_token = max((one for one in ends if rest.startswith(one)), key=len, default="")
            end = len(whole) - len(rest) + len(closing_token) if closing_token else end
            spans.append((first, end))
    return whole, spans


def _alike(one: str, other: str) -> int:
    """How many characters at their beginning are the same."""
    differing = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def batched(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length: longest first, so that memory runs out at once or never."""
    ordered = sorted(windows, key=lambda w: -len(w.token_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@dataclass(frozen=True, slots=True)
class Batch:
    """B windows, padded on the right to S tokens.

    Attributes:
        input_ids: [B, S] int64.
        attention_mask: [B, S] int64, 0 on padding.
        predicts: [B, S] bool: the token after this one has a loss that counts.

    """

    windows: tuple[Window, ...]
    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor


def make_batch(windows: Sequence[Window], device: torch.device) -> Batch:
    """Pads with token 0, which the attention mask hides."""
    longest = max(len(w.token_ids) for w in windows)
    input_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    predicts = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        n = len(window.token_ids)
        input_ids[row, :n] = torch.tensor(window.token_ids)
        mask[row, :n] = 1
        predicts[row, [at - 1 for at in window.target_at]] = True
    return Batch(tuple(windows), input_ids.to(device), mask.to(device), predicts.to(device))


def token_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats [B, S] of each token's successor; 0 where `predicts` is False.

    logits: [B, S, V], any float dtype; the loss is taken in f32.
    """
    targets = batch.input_ids[:, 1:]
    flat = logits[:, :-1].float().flatten(0, 1)
    nll = F.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    return F.pad(nll, (0, 1)).where(batch.predicts, 0.0)
