"""From a URL to a place."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import tensorstore as ts

from whalejax.storage import threefs
from whalejax.storage.files import Files
from whalejax.storage.objects import WORKERS, Objects
from whalejax.storage.place import Place

# A server that refuses connections, answers 5xx or cannot be resolved is asked for about 32 s.
RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "8s"}


def open(url: Path | str) -> Place:
    """A place for bytes. Nothing is asked of a server before the place is used.

    Credentials come from where Google's and Amazon's own programs look for them; without any, S3
    and Google Cloud Storage are asked anonymously.

    Args:
      url: one of
        - a path, or `file:///path`: a folder of a file system;
        - `3fs:///mount/path`: a folder that must lie on a 3FS mount; as a plain path it is the same
          place;
        - `gs://bucket/prefix`;
        - `s3://bucket/prefix`, with `?endpoint=http://host:port` for a store that is not Amazon's,
          `region=us-east-1` to spare the question, `anonymous=true` to use no credentials;
        - `memory://name`: this process' memory; the same name, the same objects.
        Prefixes are percent-decoded.

    Raises:
      ValueError: an unknown scheme or option, or a bucket's name that is missing or not allowed;
        a path that was called 3FS lies on no 3FS mount.
    """
    text = str(url)
    if text.startswith(threefs.SCHEME):
        path, mount = threefs.resolve(text)
        return Files(path, mount=mount)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _folder(_path(text))
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r} in {text!r}; known: {sorted(KNOWN_SCHEMES)}")
    parts = urlsplit(f"//{rest}")  # which takes no scheme that begins with a digit
    if parts.fragment:
        raise ValueError(f"{text!r} has a fragment, {parts.fragment!r}: write # as %23")
    return SCHEMES[scheme](text, parts)


def _path(text: str) -> Path:
    if match := re.match(rf"({'|'.join(SCHEMES)}):/", text):
        raise ValueError(f"{text!r} looks like a {match[1]}:// URL that went through pathlib")
    return Path(text)


def _files(url: str, parts: SplitResult) -> Files:
    _options(url, parts, ())
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise ValueError(f"{url!r} is no file:///path: its host is {parts.netloc!r}")
    return _folder(Path(unquote(parts.path)))


def _folder(path: Path) -> Files:
    return Files(path, mount=threefs.find(path))


def _gcs(url: str, parts: SplitResult) -> Objects:
    _options(url, parts, ())
    context = {
        "gcs_request_retries": RETRIES,
        "gcs_request_concurrency": {"limit": WORKERS},
    }
    return _objects(url, parts, "gcs", {"bucket": parts.netloc}, ts.Context(context))


def _s3(url: str, parts: SplitResult) -> Objects:
    options = _options(url, parts, ("endpoint", "region", "anonymous"))
    context = {"s3_request_retries": RETRIES, "s3_request_concurrency": {"limit": WORKERS}}
    if options.get("anonymous", "true") != "true":
        raise ValueError(f"anonymous={options['anonymous']!r} in {url!r}: only 'true'")
    if "anonymous" in options:
        context["aws_credentials"] = {"type": "anonymous"}
    spec = {"bucket": parts.netloc}
    if "endpoint" in options:
        spec["endpoint"] = options["endpoint"].rstrip("/")
    if "region" in options:
        spec["aws_region"] = options["region"]
    return _objects(url, parts, "s3", spec, ts.Context(context))


def _memory(url: str, parts: SplitResult) -> Objects:
    _options(url, parts, ())
    return _objects(url, parts, "memory", {}, _memories())


SCHEMES: dict[str, Callable[[str, SplitResult], Place]] = {
    "file": _files,
    "gs": _gcs,
    "s3": _s3,
    "memory": _memory,
}
KNOWN_SCHEMES = ("3fs", *SCHEMES)


@cache
def _memories() -> ts.Context:
    """What holds the objects of all `memory://`."""
    return ts.Context()


def _objects(url: str, parts: SplitResult, kind: str, spec: dict, context: ts.Context) -> Objects:
    if not parts.netloc:
        raise ValueError(f"{url!r} has no name after ://")
    prefix = unquote(parts.path).strip("/")
    if kind == "memory":  # has no buckets
        prefix = f"{parts.netloc}/{prefix}".rstrip("/")
    path = f"{prefix}/" if prefix else ""
    try:
        store = ts.KvStore.open({"driver": kind, "path": path, **spec}, context=context).result()
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from error
    return Objects(store, url, kind)


def _options(url: str, parts: SplitResult, known: tuple[str, ...]) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"unknown options {unknown} in {url!r}; known: {known}")
    if len(options) < len(pairs) or not all(options.values()):
        raise ValueError(f"options of {url!r} are given twice or empty: {pairs}")
    return options
