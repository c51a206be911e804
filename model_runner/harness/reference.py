"""Reference text from the training split of a question set, without what its test items know of it.

A row is left out when its question is that of a test item, or has 8 words in a row in common with one. Words in a row
that more than a few test questions share are how an exam asks ("which of the following is the most likely diagnosis")
and tell of none of them.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from model_runner.errors import BadInput
from model_runner.harness.sets import Item

GRAM_WORDS = 8
SIZES = (20, 1000)
_WORD = re.compile(r"[^\W_]+")  # a blank to be filled in is punctuation
# Soft hyphens, zero-width spaces and joiners, byte order marks: within words, and not to be seen.
_INVISIBLE = dict.fromkeys((0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF))


class Reason(StrEnum):
    """Why a row is left out, the first that holds."""

    SUBJECT = "of another subject"
    NO_ANSWER = "without an answer"
    REPEATED = "said by an earlier row"
    TEST_ITEM = "the question of a test item"
    TEST_WORDS = f"{GRAM_WORDS} words in a row of a test item"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is left out.

    Attributes:
        test_item: the name of one that it shares something with; empty where that is not the reason.
        shared: the words.

    """

    item: Item
    reason: Reason
    test_item: str = ""
    shared: str = ""


@dataclass(frozen=True, slots=True)
class Reference:
    """What is to be remembered.

    Attributes:
        items: drawn, in the order of the files.
        rows: that were read.
        left_out: in their order.
        candidates: rows that were left, by subject.
        common: runs of 8 words that did not count, since more test questions than allowed have them.

    """

    items: tuple[Item, ...]
    rows: int
    left_out: tuple[LeftOut, ...]
    candidates: Counter[str]
    common: int

    @property
    def reasons(self) -> Counter[Reason]:
        """How many rows were left out, by reason."""
        return Counter(each.reason for each in self.left_out)


def make_reference(
    items: Sequence[Item],
    test_items: Iterable[Item],
    size: int,
    seed: int,
    *,
    subjects: Sequence[str] = (),
    common: int = 5,
) -> Reference:
    """`size` items that share nothing with test items, as many of each subject as can be.

    Of one seed the smaller reference is part of the larger one. subjects: the only ones, by their names in the set;
    none: all. common: words in a row that more test questions than this share do not count; 0: all count.

    Raises BadInput when a subject is none of the set's, or fewer rows remain.
    """
    there = Counter(item.subject for item in items)
    if unknown := [subject for subject in subjects if subject not in there]:
        raise BadInput(f"subject: got {unknown[0]!r}, the files have {_listed(there)}")
    known, left_out, candidates = TestItems(test_items, common), list[LeftOut](), list[Item]()
    seen = set[tuple[object, ...]]()
    for item in items:
        found = _left_out(item, subjects, seen) or known.shared_with(item)
        seen.add(_said(item))
        if found is None:
            candidates.append(item)
        else:
            left_out.append(found)
    remaining = Counter(item.subject for item in candidates)
    reference = Reference((), len(items), tuple(left_out), remaining, known.common)
    if len(candidates) < size:
        why = ", ".join(f"{n} {reason}" for reason, n in reference.reasons.most_common())
        smaller = "a smaller --size, or " if len(candidates) >= SIZES[0] else ""
        raise BadInput(
            f"size: got {size}, but of {len(items)} rows {len(candidates)} remain ({why or 'none left out'}); give "
            f"{smaller}more --files"
        )
    _require_own_names(candidates)
    drawn = {id(item) for item in draw(candidates, size, seed, lambda item: item.subject)}
    kept = tuple(item for item in candidates if id(item) in drawn)
    return Reference(kept, len(items), tuple(left_out), remaining, known.common)


def draw(
    items: Sequence[Item], size: int, seed: int, subject_of: Callable[[Item], str]
) -> list[Item]:
    """The first `size` of turns in which every subject that has one left gives an item; both orders are the seed's."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(subject_of(item), []).append(item)
    subjects = sorted(groups)
    random.Random(f"{seed} subjects").shuffle(subjects)
    for subject, group in groups.items():
        random.Random(f"{seed} of {subject}").shuffle(group)
    longest = max(map(len, groups.values()), default=0)
    turns = (groups[s][n] for n in range(longest) for s in subjects if n < len(groups[s]))
    return [item for item, _ in zip(turns, range(size), strict=False)]


class TestItems:
    """What the questions of test items say.

    Attributes:
        common: runs of 8 words that do not count, since more than `allowed` questions have them; 0 allowed: all count.

    """

    __test__ = False  # no class of tests

    def __init__(self, items: Iterable[Item], allowed: int) -> None:
        self._whole: dict[tuple[object, ...], str] = {}
        self._questions: dict[str, str] = {}
        self._grams: dict[str, str] = {}
        self.common = 0
        asked, with_gram = Counter[str](), Counter[str]()
        for item in items:
            said, question = _said(item), _normal(item.question)
            if said in self._whole:  # test files may repeat each other
                continue
            self._whole[said] = item.name
            asked[question] += 1
            if question in self._questions:
                continue
            self._questions[question] = item.name
            for gram in set(_grams(question)):
                with_gram[gram] += 1
                self._grams.setdefault(gram, item.name)
        if not self._whole:
            raise BadInput("test files: hold no rows, expected the test items of the set")
        if allowed:
            self._forget(asked, with_gram, allowed)

    def _forget(self, asked: Counter[str], with_gram: Counter[str], allowed: int) -> None:
        """What more than `allowed` test items have: "Which is true?" of other choices each time, too."""
        usual = [gram for gram, number in with_gram.items() if number > allowed]
        self.common = len(usual)
        for gram in usual:
            del self._grams[gram]
        for question in [question for question, number in asked.items() if number > allowed]:
            del self._questions[question]

    def shared_with(self, item: Item) -> LeftOut | None:
        """The item and what it shares with a test item; None: nothing."""
        question = _normal(item.question)
        same = self._whole.get(_said(item)) or self._questions.get(question)
        if same is not None:
            return LeftOut(item, Reason.TEST_ITEM, same, question)
        gram = next((gram for gram in _grams(question) if gram in self._grams), None)
        if gram is None:
            return None
        return LeftOut(item, Reason.TEST_WORDS, self._grams[gram], gram)


def _left_out(item: Item, subjects: Sequence[str], seen: set[tuple[object, ...]]) -> LeftOut | None:
    if subjects and item.subject not in subjects:
        return LeftOut(item, Reason.SUBJECT)
    if not item.answer:
        return LeftOut(item, Reason.NO_ANSWER)
    return LeftOut(item, Reason.REPEATED) if _said(item) in seen else None


def _normal(text: str) -> str:
    """Its words, without case, accents' spelling, punctuation and what is invisible."""
    visible = unicodedata.normalize("NFKC", text.translate(_INVISIBLE))
    return " ".join(_WORD.findall(visible.casefold()))


def _said(item: Item) -> tuple[object, ...]:
    """The question and its choices in any order."""
    return _normal(item.question), tuple(sorted(map(_normal, item.choices)))


def _grams(question: str) -> list[str]:
    words = question.split(" ")
    return [" ".join(words[n : n + GRAM_WORDS]) for n in range(len(words) - GRAM_WORDS + 1)]


def _require_own_names(items: Sequence[Item]) -> None:
    """Names become the ids of examples, which are of one text each."""
    [(name, number)] = Counter(item.name for item in items).most_common(1)
    if number > 1:
        raise BadInput(
            f"files: {number} different rows are named {name!r}; give one version of the set only"
        )


def _listed(subjects: Iterable[str]) -> str:
    return ", ".join(repr(subject) for subject in sorted(subjects)) or "no rows"
