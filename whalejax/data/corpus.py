"""Corpora: the Python standard library, or the user's text and parquet, split into two parts."""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

HELDOUT_ONE_IN = 12  # documents
HELDOUT_TAIL = 0.05  # of each document, where there are too few to hold out whole ones
MAX_FILE_BYTES = 200_000  # longer files of the standard library are generated tables
MIN_TRAIN_FILES, MIN_HELDOUT_FILES = 400, 40
# What is not part of the language's own library, or says the same thing again and again. The
# tables in `encodings/` say little, but without them Python 3.13 has 44 files to hold out, too
# near the 40 that are needed; they move the trigram's held-out loss by under 0.01 nats a byte.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents for training and held out; no text is in both.

    Attributes:
      train, heldout: the documents, as UTF-8 bytes.
      train_names, heldout_names: a name for each, for people to read.
    """

    train: Sequence[bytes]
    heldout: Sequence[bytes]
    train_names: Sequence[str]
    heldout_names: Sequence[str]


def standard_library(folder: Path | None = None) -> Corpus:
    """The source files of the running interpreter's standard library, bytes as they are.

    Args:
      folder: another library to read, for tests.

    Raises:
      ValueError: fewer files than a fair comparison needs (some systems strip the library).
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    names, documents = [], []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if LEFT_OUT & set(name.split("/")[:-1]) or not path.is_file():
            continue
        try:
            content = path.read_bytes()
        except OSError:  # not ours to read
            continue
        if 0 < len(content) <= MAX_FILE_BYTES:
            names.append(name)
            documents.append(content)
    corpus = split(names, documents)
    if len(corpus.train) < MIN_TRAIN_FILES or len(corpus.heldout) < MIN_HELDOUT_FILES:
        raise ValueError(
            f"the standard library in {folder} has {len(corpus.train)} files to train on and "
            f"{len(corpus.heldout)} to hold out; {MIN_TRAIN_FILES} and {MIN_HELDOUT_FILES} are "
            "needed: give your own text with --data"
        )
    return corpus


def read(path: Path, *, column: str = "text") -> Corpus:
    """The user's own text.

    Args:
      path: a text file, a `.parquet` file, or a folder of either, hidden files left out. Each file
        or row is a document, and `split` parts them.
      column: the text column of parquet files.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: no text there, a file cannot be read, is not UTF-8 or not parquet, or lacks the
        column.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = _visible(path) if path.is_dir() else [path]
    names, documents = [], []
    for file in files:
        for name, document in _documents(file, column):
            if document:
                label = file.name if file == path else file.relative_to(path).as_posix()
                names.append(label + name)
                documents.append(document)
    if not documents:
        raise ValueError(f"{path} holds no text: the corpus is empty")
    return split(names, documents)


def split(names: Sequence[str], documents: Sequence[bytes]) -> Corpus:
    """Holds out one document in 12, by a hash of the name: each stays put as others come and go.

    Where that leaves a side empty (one document, or a few) the last 5 % of each is held out.
    """
    parts: tuple[list, list, list, list] = ([], [], [], [])
    for name, document in zip(names, documents, strict=True):
        digest = hashlib.sha256(name.encode()).digest()
        side = int(int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0)
        parts[side].append(document)
        parts[2 + side].append(name)
    train, heldout, train_names, heldout_names = parts
    if not train or not heldout:
        return _split_each(names, documents)
    return Corpus(
        train=train, heldout=heldout, train_names=train_names, heldout_names=heldout_names
    )


def _split_each(names: Sequence[str], documents: Sequence[bytes]) -> Corpus:
    cuts = [_cut(document) for document in documents]
    return Corpus(
        train=[document[:at] for document, at in zip(documents, cuts, strict=True)],
        heldout=[document[at:] for document, at in zip(documents, cuts, strict=True)],
        train_names=[f"{name} (beginning)" for name in names],
        heldout_names=[f"{name} (end)" for name in names],
    )


def _cut(document: bytes) -> int:
    """A place near the end, between two characters."""
    at = int(len(document) * (1 - HELDOUT_TAIL))
    while 0 < at < len(document) and document[at] & 0xC0 == 0x80:  # inside a UTF-8 character
        at -= 1
    return at


def _visible(folder: Path) -> list[Path]:
    """Its files, but no `.git` and no `.DS_Store`."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _documents(file: Path, column: str) -> Iterable[tuple[str, bytes]]:
    if file.suffix == ".parquet":
        yield from _rows(file, column)
        return
    try:
        content = file.read_bytes()
        content.decode()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte {content[error.start]:#04x} at {error.start}"
        ) from None
    yield "", content


def _rows(file: Path, column: str) -> Iterable[tuple[str, bytes]]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {_first_line(error)}") from None
    if column not in parquet.schema_arrow.names:
        raise ValueError(
            f"{file} has no column {column!r}; it has {', '.join(parquet.schema_arrow.names)}"
        )
    row = 0
    try:
        for batch in parquet.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    kind = type(value).__name__
                    raise ValueError(f"{file}: column {column!r} holds {kind}, not text")
                yield f"#{row}", (value or "").encode()
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged after row {row}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
