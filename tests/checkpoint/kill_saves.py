"""Saves step after step in children that are killed at random moments; checks what is left.

`python kill_saves.py URL KILLS SEED` prints a JSON line. Children are forked before JAX starts a
device, so that hundreds take minutes.
"""

import json
import os
import random
import signal
import sys
import time
import traceback

import jax
import numpy as np

from whalejax.checkpoint import CheckpointStore

EXTENT_BYTES = 2**14
LONGEST_S = 0.5  # from a child's first save to its end


def tree(step):
    """What a step holds: 24 arrays, 1.5 MiB, each its own values."""
    rng = np.random.default_rng(step)
    arrays = {f"layer_{i}": {"w": rng.standard_normal((16, 1024), np.float32)} for i in range(24)}
    return {"params": arrays, "step": np.int64(step), "key": jax.random.key(step)}


def equal(found, wanted):
    """Whether two trees hold the same bytes."""

    def raw(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(raw(a) == raw(b) for a, b in pairs)


def child(url, report):
    """Saves until it is killed; writes the number of each step that `wait` said is complete."""
    store = CheckpointStore(url, keep=2, extent_bytes=EXTENT_BYTES)
    latest = store.latest()
    step = 0 if latest is None else latest + 1
    jax.block_until_ready(tree(step)["key"])  # JAX starts its device
    os.write(report, b"-1\n")
    while True:
        store.save(step, tree(step))
        store.wait()
        os.write(report, f"{step}\n".encode())
        step += 1


def kill_one(url, rng):
    """Lets a child save until a random moment; returns the last step that it called complete."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(url, writing)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as reports:
        told = reports.read(3)  # it saves now
        time.sleep(rng.uniform(0, LONGEST_S))
        os.kill(pid, signal.SIGKILL)
        told += reports.read()
    _, status = os.waitpid(pid, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise SystemExit(f"a child ended by itself: {status}")
    lines = told.split(b"\n")[:-1]  # the last may be half a line
    return max(int(line) for line in lines)


def look(url):
    """What is left, in a child of its own: steps that restore bit for bit, and unfinished ones."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = CheckpointStore(url)
        wrong = [step for step in store.steps() if not equal(store.restore(step), tree(step))]
        found = {"steps": store.steps(), "wrong": wrong, "unfinished": store.unfinished()}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def main(url, kills, seed):
    """Kills, looks, and goes on, again and again."""
    rng = random.Random(seed)
    complete, summary = -1, {"kills": kills, "unfinished": 0, "saved": 0, "lost": [], "wrong": []}
    for turn in range(kills):
        told = kill_one(url, rng)
        complete = max(complete, told)
        left = look(url)
        newest = max(left["steps"], default=-1)
        summary["wrong"] += left["wrong"]
        summary["unfinished"] += bool(left["unfinished"])
        summary["saved"] = newest + 1
        if newest < complete:
            summary["lost"].append([turn, complete, newest])
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
