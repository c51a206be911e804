"""Cleaning of pages and dictionaries, on texts small enough to read."""

import pytest

from examples.small_moe import cleaning
from examples.small_moe.debian_packages import PackageUnavailableError, unpacked
from examples.small_moe.sources import Document
from examples.small_moe.texts import chunked, general_splits, shifted_splits


def test_html_text_keeps_prose_and_code_and_drops_menus():
    page = (
        "<html><head><title>No</title></head><body><div class='navheader'><p>No</p></div>"
        "<h1>Title</h1><p>One &amp; <b>two</b>\nthree<p>Four<pre>a\n  b</pre>"
        "<script>no()</script></body></html>"
    )
    assert cleaning.html_text(page) == "Title\n\nOne & two three\n\nFour\n\na\nb"


def test_html_text_prefers_the_main_part():
    assert cleaning.html_text("<body>menu<main><p>text</p></main>footer</body>") == "text"


def test_layout_is_kept_where_it_is_meant():
    page = "<body> <p>One  two</p> <pre>if a:\n    b  \n\n\n\tc</pre><p> Three</p></body>"
    assert cleaning.html_text(page, layout=True) == ("One two\n\nif a:\n    b\n\n\tc\n\nThree")
    assert cleaning.laid_out_text("\n  a  b \n\n\n\n    c\n") == "  a  b\n\n    c"


def test_wordnet_glosses_appear_once_and_unwrapped():
    text = (
        "\ncar\n    n 1: a motor vehicle with\n         four wheels [syn: {car}, {auto}]\n"
        "auto\n    n 1: a motor vehicle with four wheels [syn: {car}, {auto}]\n"
        "run\n    v 1: move fast\n    2: be active\n"
    )
    assert list(cleaning.wordnet_entries(text)) == [
        "car\nn 1: a motor vehicle with four wheels [syn: {car}, {auto}]",
        "run\nv 1: move fast\n2: be active",
    ]


def test_repeated_paragraphs_are_dropped_and_short_ones_kept():
    long, seen = "a paragraph that is long enough to be counted", set()
    assert cleaning.without_repeats(f"{long}\n\nshort\n\n{long}", seen) == f"{long}\n\nshort"
    assert cleaning.without_repeats(f"{long}\n\nshort", seen) == "short"


def test_chunks_break_between_paragraphs():
    document = Document("a", "\n\n".join(["x" * 300] * 5))
    chunks = chunked(document, size_chars=500)
    assert [chunk.id for chunk in chunks] == ["a:0", "a:1", "a:2"]
    assert [len(chunk.text) for chunk in chunks] == [602, 602, 300]


def test_splits_are_disjoint_and_repeatable():
    sources = {"p": [Document(f"p/{n}", f"{n} " + "word " * 3000) for n in range(200)]}
    splits = general_splits(sources)
    ids = {name: {d.id.split(":")[0] for d in split} for name, split in splits.items()}
    assert not ids["general_train"] & (ids["general_dev"] | ids["general_test"])
    assert not ids["general_dev"] & ids["general_test"]
    assert ids["general_reference"] <= ids["general_train"]
    assert general_splits(sources) == splits
    chapters = [Document(str(n), "t") for n in range(300)]
    assert sorted(d.id for s in shifted_splits(chapters).values() for d in s) == sorted(
        d.id for d in chapters
    )


def test_a_package_that_cannot_be_had_is_reported(tmp_path):
    archive = tmp_path / "archives" / "nothing_1_all.deb"
    archive.parent.mkdir()
    archive.write_bytes(b"not an archive")
    with pytest.raises(PackageUnavailableError, match="nothing"):
        unpacked("nothing", tmp_path)
