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


def test_a_folder_is_read_with_its_folders(tmp_path):
    for i in range(60):
        path = tmp_path / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {i}")
    corpus = read(tmp_path)
    assert len(corpus.train) + len(corpus.heldout) == 60
    assert "part1/1.txt" in [*corpus.train_names, *corpus.heldout_names]


def write_parquet(path, texts, column="text"):
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path)


def test_parquet_rows_are_documents(tmp_path):
    texts = [f"row {i}" for i in range(50)] + [None, ""]
    write_parquet(tmp_path / "a.parquet", texts, "body")
    corpus = read(tmp_path / "a.parquet", column="body")
    assert sorted([*corpus.train, *corpus.heldout]) == sorted(t.encode() for t in texts if t)


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


def test_the_same_name_always_falls_on_the_same_side():
    """Golden: users compare held-out losses across versions."""
    names = [f"doc{i}" for i in range(100)]
    corpus = split(names, [b"x"] * 100)
    np.testing.assert_array_equal(corpus.heldout_names, GOLDEN)


GOLDEN = ["doc3", "doc20", "doc31", "doc35", "doc45", "doc56", "doc65", "doc67", "doc76"]
