"""CheckpointStore: the checkpoints of one run, under one folder or prefix."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from whalejax import storage
from whalejax.checkpoint.comparing import Difference, compare
from whalejax.checkpoint.manifest import MANIFEST, Manifest, copy_metadata, decode
from whalejax.checkpoint.orbax_folders import hint, is_orbax
from whalejax.checkpoint.planning import EXTENT_BYTES, make_plan
from whalejax.checkpoint.processes import TIMEOUT_S, Meeting
from whalejax.checkpoint.restoring import restore_like, restore_nested
from whalejax.checkpoint.saving import Background, save
from whalejax.checkpoint.snapshot import take_snapshot
from whalejax.checkpoint.verifying import Report, verify
from whalejax.checkpoint.writing import DELETING, SAVING, Target
from whalejax.parallel.runtime import heard_by_all, is_first
from whalejax.storage.memory import Arena

START_TIMEOUT_S = 600.0  # between processes that begin a job: some load or compile longer
RUN_FOLDER = "checkpoints"  # of a training run's folder, where its checkpoints lie


def _ignore(nbytes: int) -> None:
    pass


class CheckpointStore:
    """The checkpoints of one run: `STEP/manifest.json` and the files that it names.

    In a job of several processes all make it, over storage that they share, and all call `save`,
    `wait`, `latest` and `restore` in the same order. One job writes at a time.

    Args:
      path: a folder, or a URL that `whalejax.storage.open` knows.
      keep: newest checkpoints that stay when another one is complete; None for all.
      extent_bytes: about how large files shall be.
      timeout_s: without a sign of life, after which a process of the job counts as missing.

    Raises:
      ValueError: `keep`, `extent_bytes` or `timeout_s` is not positive, or the URL is unknown.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        keep: int | None = None,
        extent_bytes: int = EXTENT_BYTES,
        timeout_s: float = TIMEOUT_S,
    ):
        if (keep is not None and keep < 1) or extent_bytes < 1 or timeout_s <= 0:
            raise ValueError(
                f"keep={keep}, extent_bytes={extent_bytes}, timeout_s={timeout_s} must be positive"
            )
        self.place = storage.open(path)
        self.keep, self.extent_bytes, self.timeout_s = keep, extent_bytes, timeout_s
        self._arena = Arena()
        self._saving: Background | None = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
        elif self._saving is not None:
            self._saving.join()  # what is under way shall still stand; the error at hand counts

    def save(self, step: int, tree: Any, *, metadata: Any = None, block: bool = False) -> None:
        """Saves a tree; returns once its bytes are copied on the host, the rest goes on beside.

        Until the save before it is done, it waits: no more than one copy is ever held.

        Args:
          step: a number that has no checkpoint yet.
          tree: of `jax.Array`s of any sharding, PRNG keys, QuantizedArrays, NumPy arrays, numbers
            and strings. Its arrays may be donated or changed once this returns.
          metadata: JSON to keep with it.
          block: return when the checkpoint is complete; what is on the host is not copied then.

        Raises:
          OSError: the save before this one failed, which is told once, and this one was not begun;
            with `block` also that this one failed.
          ValueError: `step` is negative or has a checkpoint; `metadata` is no JSON; two leaves get
            one name.
          TypeError: a leaf cannot be stored, or `step` is no integer.
        """
        self.wait()
        step = int(operator.index(step))
        if step < 0 or self._is_complete(step):
            raise ValueError(f"step={step} must be a number that {self.place.url} does not hold")
        if is_orbax(self.place, str(step)):
            raise ValueError(f"step={step} is in {self.place.url} already, saved by Orbax")
        metadata = copy_metadata(metadata)
        plan = make_plan(tree, extent_bytes=self.extent_bytes)
        title = f"saving step {step} to {self.place.url}"
        meeting = Meeting(title, self.timeout_s)
        with meeting.attended():  # large first snapshots take longer than others wait
            snapshot = take_snapshot(plan, meeting.process, None if block else self._arena)
        plan = plan.without_arrays()  # which may be freed while what was copied is written
        target = Target(self.place, str(step))

        def run() -> None:
            save(target, plan, snapshot, meeting, step=step, metadata=metadata)
            if meeting.process == 0:
                self._thin_out(step)

        if block:
            run()
        else:
            self._saving = Background(run, title)

    def wait(self) -> None:
        """Waits for the save that is under way.

        Raises:
          OSError: it failed: its checkpoint is not there, or is whole but may not be durable; those
            before it are as they were.
        """
        if self._saving is None:
            return
        self._saving.join()  # interrupted here, it still holds the copy that it writes
        saving, self._saving = self._saving, None
        saving.wait()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, in order."""
        found = (int(name) for name in self.place.folders("") if name.isdecimal())
        return sorted(step for step in found if self._is_complete(step))

    def latest(self) -> int | None:
        """The newest step, the same in all processes; None without any.

        Raises:
          TimeoutError: the first process did not tell the others.
        """
        newest = self.steps()[-1:] if is_first() else []
        answer = heard_by_all("".join(map(str, newest)), timeout_s=START_TIMEOUT_S)
        return int(answer) if answer else None

    def manifest(self, step: int) -> Manifest:
        """What the checkpoint of a step consists of; its `metadata` is what `save` was given.

        Raises:
          FileNotFoundError: there is none of this step.
          DamagedError: the manifest is damaged.
        """
        file = f"{step}/{MANIFEST}"
        try:
            data = self.place.get(file)
        except FileNotFoundError:
            self._miss(step)
        return decode(data, file)

    def restore(
        self,
        step: int | None = None,
        like: Any = None,
        *,
        verify: bool = True,
        progressed: Callable[[int], None] = _ignore,
    ) -> Any:
        """Restores a checkpoint; its extents' checksums are compared as they are read.

        Args:
          step: which; None for the newest.
          like: a tree of arrays, concrete or abstract: what it names is restored, in its dtypes and
            shardings, and no more is read than this process's devices need. Its NumPy arrays are
            filled in place. None for all, as nested dicts of NumPy arrays.
          verify: False to compare no checksums.
          progressed: called with the bytes of each extent that was read.

        Returns:
          The tree.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: `like` does not fit what is stored; lists all.
          DamagedError: something is damaged; names it.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(
                f"{self.place.url} holds no complete checkpoint{hint(self.place)}"
            )
        manifest, options = self.manifest(step), {"verify": verify, "progressed": progressed}
        if like is None:
            return restore_nested(self.place, str(step), manifest, **options)
        return restore_like(self.place, str(step), manifest, like, **options)

    def verify(
        self, step: int, *, repair: bool = False, progressed: Callable[[int], None] = _ignore
    ) -> Report:
        """Reads all of a checkpoint and says what is not as it was written; in one process.

        Args:
          step: which.
          repair: mend single flipped bits where both checksums of the mended bytes prove them, and
            metadata of arrays; the broken file is kept as `FILE.broken`.
          progressed: called with the bytes of each extent that was read, and with 0 for an
            array's metadata.

        Raises:
          FileNotFoundError: there is none of this step.
          ValueError: it is of a later version.
        """
        if not self._is_complete(step):
            self._miss(step)
        return verify(self.place, str(step), repair=repair, progressed=progressed)

    def diff(self, a: int, b: int) -> Difference:
        """What differs between the checkpoints of two steps; reads no more than it needs.

        Raises:
          FileNotFoundError: there is none of one of them.
          DamagedError: one of them is damaged where it has to be read.
        """
        return compare(self.place, self.manifest(a), self.manifest(b))

    def remove(self, step: int) -> None:
        """Deletes the checkpoint of a step; killed meanwhile, it leaves none that looks complete.

        Raises:
          FileNotFoundError: there is none.
        """
        if not self._is_complete(step):
            self._miss(step)
        if self.place.renames:
            self.place.remove_tree(f"{step}{DELETING}")  # left over from the step's life before
            self.place.rename(str(step), f"{step}{DELETING}")
            self.place.remove_tree(f"{step}{DELETING}")
        else:
            self.place.remove(f"{step}/{MANIFEST}")
            self.place.remove_tree(str(step))

    def unfinished(self) -> list[str]:
        """Folders of saves and deletions that were killed."""
        found = self.place.folders("")
        if self.place.renames:
            stems = {name: name.removesuffix(SAVING).removesuffix(DELETING) for name in found}
            return [name for name, stem in stems.items() if stem != name and stem.isdecimal()]
        steps = [name for name in found if name.isdecimal() and not self._is_complete(int(name))]
        return [name for name in steps if not is_orbax(self.place, name)]

    def clean(self) -> None:
        """Deletes what saves left that were killed; not while another job is saving here."""
        for folder in self.unfinished():
            self.place.remove_tree(folder)

    def _miss(self, step: int) -> NoReturn:
        steps = ", ".join(map(str, self.steps())) or "none"
        raise FileNotFoundError(
            f"{self.place.url} has no checkpoint of step {step}; its steps: {steps}"
            f"{hint(self.place)}"
        ) from None

    def _is_complete(self, step: int) -> bool:
        return self.place.size(f"{step}/{MANIFEST}") is not None

    def _thin_out(self, step: int) -> None:
        """Deletes what is not to be kept once `step` is complete."""
        if self.keep is not None:
            for old in self.steps()[: -self.keep]:
                if old != step:  # older than others after a run went back; it is still wanted
                    self.remove(old)
        self.clean()
