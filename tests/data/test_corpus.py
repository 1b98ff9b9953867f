from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from whalejax.data.corpus import read, split, standard_library


@pytest.fixture(scope="module")
def library():
    return standard_library()


def test_the_standard_library_is_enough_and_split_by_file(library):
    assert len(library.train) >= 400 and len(library.heldout) >= 40
    assert not set(library.train_names) & set(library.heldout_names)
    assert any("/" in name for name in library.train_names)
    assert not any("/test/" in f"/{name}" for name in library.train_names)
    assert all(library.train) and len(library.train) == len(library.train_names)


def test_the_documents_are_the_files(library):
    import json.decoder

    name = "json/decoder.py"
    names = [*library.train_names, *library.heldout_names]
    documents = [*library.train, *library.heldout]
    with open(json.decoder.__file__, "rb") as file:
        assert documents[names.index(name)] == file.read()


def test_a_stripped_library_is_refused(tmp_path):
    (tmp_path / "os.py").write_text("pass")
    with pytest.raises(ValueError, match="400 and 40 are needed"):
        standard_library(tmp_path)


def test_a_document_stays_on_its_side_as_others_come():
    names = [f"{i}.txt" for i in range(200)]
    documents = [name.encode() for name in names]
    few, many = split(names[:100], documents[:100]), split(names, documents)
    assert set(few.heldout_names) <= set(many.heldout_names)
    assert 5 <= len(many.heldout) <= 40
    assert len(many.train) + len(many.heldout) == 200


def test_one_file_is_cut_near_its_end_between_characters(tmp_path):
    text = "wäle schwimmen " * 100
    (tmp_path / "a.txt").write_text(text)
    corpus = read(tmp_path / "a.txt")
    parts = corpus.train[0].decode() + corpus.heldout[0].decode()
    assert parts == text and 0.03 < len(corpus.heldout[0]) / len(text.encode()) < 0.07


@pytest.mark.parametrize("letters", range(20, 40))
def test_no_character_is_cut_in_two(tmp_path, letters):
    (tmp_path / "a.txt").write_text("鯨" * letters, encoding="utf-8")
    corpus = read(tmp_path / "a.txt")
    assert corpus.train[0].decode() + corpus.heldout[0].decode() == "鯨" * letters


def test_a_folder_is_read_with_its_folders(tmp_path):
    for i in range(60):
        path = tmp_path / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {i}")
    corpus = read(tmp_path)
    assert len(corpus.train) + len(corpus.heldout) == 60
    assert "part1/1.txt" in [*corpus.train_names, *corpus.heldout_names]


def test_hidden_files_are_not_text(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff\x00")
    (tmp_path / ".DS_Store").write_bytes(b"\xff\x00")
    (tmp_path / "a.txt").write_text("text " * 20)
    assert read(tmp_path).train_names == ["a.txt (beginning)"]


@pytest.mark.parametrize("sides", [[0] * 3, [1] * 2], ids=["all to train on", "all held out"])
def test_few_documents_are_each_cut(sides):
    """By their names alone one side would be empty."""
    names = {0: ["doc0", "doc1", "doc2"], 1: ["doc3", "doc20"]}[sides[0]]
    documents = [name.encode() * 25 for name in names]
    corpus = split(names, documents)
    pairs = zip(corpus.train, corpus.heldout, strict=True)
    assert [beginning + end for beginning, end in pairs] == documents
    assert all(0 < len(end) < 10 for end in corpus.heldout)
    assert corpus.heldout_names == [f"{name} (end)" for name in names]


def test_files_that_cannot_be_opened_are_left_out(tmp_path, monkeypatch):
    """Permissions do not bind root, so the refusal itself is imitated."""
    for i in range(600):
        (tmp_path / f"{i}.py").write_text("pass")
    whole = standard_library(tmp_path)
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == whole.train_names[0]:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert standard_library(tmp_path).train_names == whole.train_names[1:]
    with pytest.raises(ValueError, match=f"{whole.train_names[0]} cannot be read: Permission"):
        read(tmp_path)


def test_what_is_not_the_library_proper_is_left_out(tmp_path):
    for i in range(600):
        (tmp_path / f"{i}.py").write_text("pass")
    for folder in ("test", "idlelib/idle_test", "ctypes/tests", "site-packages/x", "__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("pass")
    (tmp_path / "tables.py").write_text("x" * 200_001)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "test.py").write_text("a module may be called test")
    corpus = standard_library(tmp_path)
    names = {*corpus.train_names, *corpus.heldout_names}
    assert names == {f"{i}.py" for i in range(600)} | {"package/test.py"}


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)


def test_parquet_rows_are_documents(tmp_path):
    texts = [f"row {i}" for i in range(50)] + [None, ""]
    write_parquet(tmp_path / "a.parquet", texts, "body")
    corpus = read(tmp_path / "a.parquet", column="body")
    assert sorted([*corpus.train, *corpus.heldout]) == sorted(t.encode() for t in texts if t)


def test_a_folder_of_parquet_is_read_row_by_row(tmp_path):
    for part in range(3):
        write_parquet(tmp_path / f"{part}.parquet", [f"part {part} row {i}" for i in range(20)])
    corpus = read(tmp_path)
    names = [*corpus.train_names, *corpus.heldout_names]
    documents = [*corpus.train, *corpus.heldout]
    assert len(names) == 60
    assert documents[names.index("2.parquet#7")] == b"part 2 row 7"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda p: None, FileNotFoundError, "does not exist"),
        (lambda p: p.write_bytes(b""), ValueError, "the corpus is empty"),
        (lambda p: p.mkdir(), ValueError, "the corpus is empty"),
        (lambda p: p.write_bytes(b"ab\xff"), ValueError, "not UTF-8 text: byte 0xff at 2"),
    ],
    ids=["missing", "empty file", "empty folder", "binary"],
)
def test_text_that_cannot_be_read(tmp_path, make, error, says):
    make(tmp_path / "text")
    with pytest.raises(error, match=says):
        read(tmp_path / "text")


@pytest.mark.parametrize("damage", ["not parquet", "other column", "numbers"])
def test_parquet_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"] if damage != "numbers" else [1])
    if damage == "not parquet":
        path.write_bytes(b"PAR1 and nothing else")
    says = {"not parquet": "is not a parquet file", "other column": "no column 'body'; it has text",
            "numbers": "holds int"}[damage]  # fmt: skip
    with pytest.raises(ValueError, match=says):
        read(path, column="body" if damage == "other column" else "text")


def test_a_damaged_page_names_the_file(tmp_path):
    rng = np.random.default_rng(0)
    write_parquet(tmp_path / "a.parquet", [rng.bytes(50).hex() for _ in range(5000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[5000:9000] = bytes(4000)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet is damaged after row 0"):
        read(tmp_path / "a.parquet")


def test_the_same_name_always_falls_on_the_same_side():
    """Golden: users compare held-out losses across versions."""
    names = [f"doc{i}" for i in range(100)]
    corpus = split(names, [b"x"] * 100)
    np.testing.assert_array_equal(corpus.heldout_names, GOLDEN)


GOLDEN = ["doc3", "doc20", "doc31", "doc35", "doc45", "doc56", "doc65", "doc67", "doc76"]
