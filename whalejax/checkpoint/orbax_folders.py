"""What Orbax leaves in a run's folder, told from names alone: nothing here imports Orbax."""

from whalejax.storage import Place

STEP_FILE = "_CHECKPOINT_METADATA"  # in the folder of a step, and in that of a tree saved alone
TREE_FILE = "_METADATA"  # in the folder of an item that is a tree
SUFFIX = ".orbax-checkpoint-tmp"  # of what is being written


def orbax_steps(place: Place) -> dict[int, str]:
    """The steps that an Orbax CheckpointManager completed in a folder, and their folders' names.

    A step's folder may be named by more than its number, as `step_0003`.
    """
    found = {}
    for folder in place.folders(""):
        number = folder.rsplit("_", 1)[-1]
        if number.isdecimal() and place.size(f"{folder}/{STEP_FILE}") is not None:
            found[int(number)] = folder
    return dict(sorted(found.items()))


def is_orbax(place: Place, folder: str) -> bool:
    """Whether a folder is a checkpoint of Orbax, complete or not."""
    return SUFFIX in folder or place.size(f"{folder}/{STEP_FILE}") is not None


def hint(place: Place) -> str:
    """What to add to an error that a folder has no checkpoint of ours; empty without Orbax's."""
    steps = ", ".join(map(str, orbax_steps(place)))
    if not steps:
        return ""
    return f" (Orbax wrote steps {steps} there: whalejax.checkpoint.read_orbax reads them)"
