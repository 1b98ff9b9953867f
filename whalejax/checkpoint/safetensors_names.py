"""How leaves are named in safetensors files, and what a note in them adds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from whalejax.checkpoint.tree import ROOT, VALUES, joined, keys_of
from whalejax.storage.safetensors_files import read_metadata

NOTE = "whalejax"  # the text in a file's header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Note:
    """What the header of a file of ours says of its tensors, beside dtypes and shapes.

    Attributes:
      leaves: names of leaves by the tensor's, where `undotted` does not give them.
      tiles: of QuantizedArrays, by the tensor that holds the values.
      values: leaves that are numbers or strings, by their names.
    """

    leaves: dict[str, str] = dataclasses.field(default_factory=dict)
    tiles: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self) -> dict[str, str]:
        """The text for the header."""
        return {NOTE: json.dumps(dataclasses.asdict(self), separators=(",", ":"))}


def read_note(file: Path) -> Note | None:
    """The note of a file; None of a file that is not ours.

    Raises:
      ValueError: it is corrupt.
    """
    text = read_metadata(file).get(NOTE)
    if text is None:
        return None
    try:
        note = Note(**json.loads(text))
        _check(note)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} has a corrupt note {NOTE!r}: {error}") from None
    return note


def _check(note: Note) -> None:
    tiles = [len(t) == 2 and all(type(n) is int and n > 0 for n in t) for t in note.tiles.values()]
    leaves = [isinstance(name, str) for name in note.leaves.values()]
    values = [isinstance(value, VALUES) for value in note.values.values()]
    if not all(tiles + leaves + values):
        raise ValueError(f"{note} is none")


def dotted(leaf: str) -> str:
    """The tensor's name of a leaf: its keys with dots between; of a lone one nothing."""
    return "" if leaf == ROOT else ".".join(keys_of(leaf))


def undotted(tensor: str) -> str:
    """The leaf's name of a tensor: each part between dots is a key."""
    return joined(tensor.split("."))
