"""Eight CPU devices, implicit promotions as errors, and what several rooms' tests ask for."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# threads of XLA's pool: the interpreter of GPU kernels needs one for each warpgroup at a time
os.environ.setdefault("NPROC", "48")

import jax
import pytest

from whalejax.kernels.backend import MIN_JAX_FOR_MOSAIC

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config, items) -> None:
    """CI runs all tests twice, on the oldest JAX and on the newest; the longest only there."""
    old = jax.__version_info__ < MIN_JAX_FOR_MOSAIC
    if old and "long" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long, on an old JAX: run with -m long"))


@pytest.fixture(scope="session", autouse=True)
def compiled_before(tmp_path_factory) -> Iterator[None]:
    """Keeps programs that took long to compile for later tests, and for processes they start.

    Most of the tests' time is compilation, and runs that go on compile what the first one did. A
    folder that the environment names is used instead.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        yield
        return
    folder = tmp_path_factory.mktemp("compiled")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
    yield
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A server on loopback, with a bucket `whalejax` that all may read and write."""
    script = Path(__file__).with_name("s3_server.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, script], text=True, **pipes) as server:
        try:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            everyone = {"x-amz-acl": "public-read-write"}
            bucket = urllib.request.Request(f"{endpoint}/whalejax", method="PUT", headers=everyone)
            urllib.request.urlopen(bucket).close()
            yield endpoint
        finally:
            server.kill()


@pytest.fixture
def s3_url(s3_endpoint) -> str:
    """A prefix of an S3 bucket that holds nothing, for `whalejax.storage.open`."""
    options = f"endpoint={s3_endpoint}&region=us-east-1&anonymous=true"
    return f"s3://whalejax/{uuid.uuid4().hex}?{options}"


CALLS = ("write", "read", "sync", "rename", "link")


@pytest.fixture(scope="session")
def failing_disk(tmp_path_factory) -> Path:
    """The library of `failing.c`, which makes calls below a folder fail when it is preloaded."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip(f"a failing file system needs Linux and a C compiler, not {sys.platform}")
    library = tmp_path_factory.mktemp("failing") / "failing.so"
    source = Path(__file__).with_name("failing.c")
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def run_failing(failing_disk) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python code in a process of its own, whose calls below a folder fail.

    `run_failing(code, *arguments, below=folder, call="write", error=errno.ENOSPC, after=5_000_000)`
    fills a disk after 5 MB; `call="sync", at=3, times=1` fails the third fsync and no other;
    `call="rename", late=True` renames and reports an error all the same. Calls of all threads
    count together, each process counts for itself. For a whole checkpoint let the code train or
    save, `below` its folder, catch what it should catch, and print what the test must know; then
    restore in the test, where nothing fails. TensorStore's writes are seen too, except through
    mmap. See `failing.c`.

    Returns:
      The finished process with its outputs as text; whatever its exit code.
    """

    def run(
        code: str,
        *arguments: object,
        below: Path,
        call: str,
        error: int = errno.EIO,
        at: int = 1,
        after: int | None = None,
        times: int | None = None,
        late: bool = False,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        if call not in CALLS or not below.is_dir():
            raise ValueError(f"call={call!r} must be one of {CALLS}, and {below} a folder")
        told = {"CALL": call, "BELOW": below, "ERRNO": error, "AT": at, "LATE": int(late)}
        told |= {"AFTER": after} if after is not None else {}
        told |= {"TIMES": times} if times is not None else {}
        environment = os.environ | {f"FAILING_{name}": str(value) for name, value in told.items()}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment | {"LD_PRELOAD": str(failing_disk)},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def threefs_mount(tmp_path) -> Iterator[Path]:
    """The root of a FUSE mount that looks like 3FS to the kernel: see `threefs_daemon.py`."""
    root = tmp_path / "hf3fs"
    root.mkdir()
    command = [sys.executable, Path(__file__).with_name("threefs_daemon.py"), root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        if (said := daemon.stdout.readline().strip()) != "mounted":
            pytest.skip(f"no FUSE file system can be mounted here: {said}")
        yield root
        subprocess.run(["umount", "--lazy", root], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def in_processes() -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """Starts a script in several processes of one job, each on CPU devices of its own.

    `in_processes(script, count, *arguments, devices=2)` calls `script NUMBER COUNT PORT *arguments`
    for each number, PORT being free for the job's coordinator; `communicate` gives what a process
    printed, and what it said of errors. None outlives the test.
    """
    started: list[subprocess.Popen] = []

    def start(script: Path, count: int, *arguments: object, devices: int) -> list[subprocess.Popen]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        job = [
            subprocess.Popen(
                [sys.executable, script, *map(str, (number, count, port, *arguments))],
                env=environment,
                text=True,
                **pipes,
            )
            for number in range(count)
        ]
        started.extend(job)
        return job

    yield start
    for process in started:
        process.kill()
        process.wait()
