from hypothesis import given
from hypothesis import strategies as st
from knnmoe.entry_ids import entry_id


@given(st.text(), st.text(), st.integers(0, 2**32 - 1))
def test_ids_are_stable_and_below_2_to_63(source: str, example: str, position: int) -> None:
    first = entry_id(source, example, position)
    assert first == entry_id(source, example, position)
    assert 0 <= first < 2**63


def test_places_that_look_alike_when_joined_differ() -> None:
    assert entry_id("a", "b1", 2) != entry_id("a", "b", 12)
    assert entry_id("ab", "c", 0) != entry_id("a", "bc", 0)


def test_the_id_of_a_place_never_changes() -> None:
    assert entry_id("law.jsonl", "7", 12) == 3257970957597211857
