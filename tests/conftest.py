"""Eight CPU devices, implicit promotions as errors, and an S3 server for who asks for it."""

import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# threads of XLA's pool: the interpreter of GPU kernels needs one for each warpgroup at a time
os.environ.setdefault("NPROC", "48")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
