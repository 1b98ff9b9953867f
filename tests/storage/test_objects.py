"""What goes wrong between an object store and its client: answers lost, servers gone, no bucket."""

import http.client
import threading
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pytest

from whalejax import storage
from whalejax.storage import objects, opening

REQUEST_HEADERS = ("Content-Type", "If-Match", "If-None-Match", "Range")


class Faulty(BaseHTTPRequestHandler):
    """Forwards to an S3 server, and does to the next requests what `server.faults[method]` says.

    "no request": drops the connection before forwarding; "no answer": after it; "half": in the
    middle of the answer's body; "busy": answers 503; a function: what it returns.
    """

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked = self.requestline
        faults = self.server.faults.get(self.command)
        fault = faults.pop(0) if faults else None
        self.close_connection = True
        if callable(fault):
            fault = fault()
        if fault == "no request":
            return
        if fault == "busy":
            self.send_error(503)
            return
        headers = {key: self.headers[key] for key in REQUEST_HEADERS if key in self.headers}
        remote = http.client.HTTPConnection(self.server.remote)
        remote.request(self.command, self.path, body, headers)
        answer = remote.getresponse()
        data = answer.read()
        if fault == "no answer":
            return
        self.send_response_only(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "half" else data)

    do_GET = do_HEAD = do_PUT = do_DELETE = forward

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def quick(monkeypatch):
    retries = {"max_retries": 3, "initial_delay": "10ms", "max_delay": "20ms"}
    monkeypatch.setattr(opening, "RETRIES", retries)


@pytest.fixture
def proxy(s3_endpoint, quick):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = False  # they are joined before the server behind is gone
    server.remote, server.faults = s3_endpoint.removeprefix("http://"), {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def direct(s3_url):
    """The place behind the proxy, not through it."""
    return storage.open(s3_url)


@pytest.fixture
def place(proxy, s3_endpoint, s3_url):
    return storage.open(s3_url.replace(s3_endpoint, f"http://127.0.0.1:{proxy.server_port}"))


# Before each PUT to a server that is not Amazon's, TensorStore asks with a HEAD if there is a file.
@pytest.mark.parametrize("later", [[], ["no request"] * 3], ids=["told", "never told"])
def test_a_put_whose_answer_is_lost_is_ours(place, proxy, later):
    proxy.faults = {"PUT": ["no answer"], "HEAD": [None, *later]}
    place.put("manifest", b"ours", exclusive=True)
    assert place.get("manifest") == b"ours"
    assert proxy.faults == {"PUT": [], "HEAD": []}


@pytest.mark.parametrize("later", [[], ["no request"] * 3], ids=["told", "never told"])
@pytest.mark.parametrize("fault", [None, "no request", "no answer", "busy"])
def test_a_put_that_comes_too_late_is_not_ours(place, direct, proxy, fault, later):
    def theirs_comes_first():
        direct.put("manifest", b"theirs")
        return fault

    proxy.faults = {"PUT": [theirs_comes_first], "HEAD": [None, *later]}
    with pytest.raises(FileExistsError, match="exists already: 's3://.*/manifest'"):
        place.put("manifest", b"ours", exclusive=True)
    assert direct.get("manifest") == b"theirs"


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_put_that_never_arrives_fails(place, direct, proxy, exclusive):
    proxy.faults = {"PUT": ["no request"] * 4}  # once, and three times again
    with pytest.raises(OSError, match="All 3 retry attempts failed.*s3://.*/manifest") as caught:
        place.put("manifest", b"ours", exclusive=exclusive)
    assert not isinstance(caught.value, FileExistsError)
    assert direct.size("manifest") is None


def test_a_put_that_failed_is_told_where_what_is_there_cannot_be(place, proxy):
    proxy.faults = {"PUT": ["busy"] * 4, "GET": ["no request"] * 4}
    with pytest.raises(OSError, match="All 3 retry attempts failed.*HTTP 503.*/manifest"):
        place.put("manifest", b"ours", exclusive=True)


@pytest.mark.parametrize("fault", ["no request", "no answer", "half", "busy"])
def test_a_fault_is_retried(place, proxy, fault):
    data = bytes(range(256)) * 4096
    proxy.faults = {"PUT": [fault] * 2 if fault != "half" else [], "GET": [fault] * 2}
    place.write("file", [memoryview(data)])
    buffer = bytearray(len(data))
    place.read("file", memoryview(buffer))
    assert buffer == data
    assert proxy.faults == {"PUT": [], "GET": []}


def test_a_cut_answer_is_never_taken_for_the_file(place, proxy):
    place.put("file", bytes(1000))
    proxy.faults = {"GET": ["half"] * 4}
    with pytest.raises(OSError, match="All 3 retry attempts failed.*/file'"):
        place.get("file")


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        *product(["s3", "gcs"], ["write", "put", "exclusive"]),
        *product(["s3"], ["names", "folders"]),  # of Google's, TensorStore does not tell
    ],
)
def test_a_missing_bucket_is_named(request, quick, kind, operation):
    url = request.getfixturevalue(f"{kind}_url")
    place = storage.open(url.replace("://whalejax/", "://no-such-bucket/"))
    calls = {
        "write": lambda: place.write("file", [memoryview(b"1")]),
        "put": lambda: place.put("file", b"1"),
        "exclusive": lambda: place.put("file", b"1", exclusive=True),
        "names": lambda: place.names("file"),
        "folders": lambda: place.folders("file"),
    }
    with pytest.raises(FileNotFoundError, match="NOT_FOUND: .*HTTP 404.*no-such-bucket/.*/file"):
        calls[operation]()


@pytest.mark.parametrize("status", [401, 403])
def test_a_listing_that_google_refuses_is_not_an_empty_one(gcs_url, gcs_server, status):
    place = storage.open(gcs_url)
    place.put("step/file", b"1")
    assert place.names("step") == ["step/file"]
    gcs_server.refusal = status
    try:
        for call in (place.names, place.folders, place.remove_tree):
            with pytest.raises(PermissionError, match=f"HTTP {status}.*gs://whalejax/.*/step"):
                call("step")
            with pytest.raises(PermissionError, match=f"HTTP {status}.*gs://whalejax/"):
                call("")
    finally:
        gcs_server.refusal = None


def test_a_refusal_is_a_permission_error(s3_endpoint, s3_url):
    request = urllib.request.Request(f"{s3_endpoint}/private", method="PUT")
    urllib.request.urlopen(request).close()
    place = storage.open(s3_url.replace("s3://whalejax/", "s3://private/"))
    place.put("file", b"1")  # moto asks only readers who they are
    with pytest.raises(PermissionError, match="PERMISSION_DENIED.*HTTP 403.*s3://private/.*/file"):
        place.get("file")


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://127.0.0.1:1", "Could not connect to server.*127.0.0.1 port 1 "),
        ("http://nowhere.invalid", "Could not resolve host: nowhere.invalid"),
    ],
)
@pytest.mark.parametrize("region", ["&region=us-east-1", ""])
def test_a_wrong_endpoint_is_told_in_one_line(quick, endpoint, reason, region):
    place = storage.open(f"s3://bucket/prefix?endpoint={endpoint}&anonymous=true{region}")
    with pytest.raises(OSError, match=rf"{reason}.*: 's3://bucket/prefix/file'") as caught:
        place.get("file")
    assert "\n" not in str(caught.value) and "curl_code" not in str(caught.value)


def test_a_server_that_never_answers_is_not_waited_for(place, proxy, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.3)
    answer = threading.Event()
    silence = partial(answer.wait, 20)
    proxy.faults = {"GET": [silence] * 2, "PUT": [silence]}
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no end within 0.3 s: 's3://.*/file'"):
        place.get("file")
    assert time.monotonic() - started < 5
    with pytest.raises(TimeoutError, match=r"no end within 0.3 s"):
        place.put("manifest", b"1", exclusive=True)
    answer.set()


def test_an_object_has_time_for_its_bytes(place, proxy, monkeypatch):
    monkeypatch.setattr(objects, "PATIENCE", 0.2)
    monkeypatch.setattr(objects, "SLOWEST", 100)
    slowly = partial(time.sleep, 0.6)
    proxy.faults = {"PUT": [slowly] * 2, "GET": [slowly] * 2}
    place.write("file", [memoryview(bytes(1000))])
    place.read("file", memoryview(bytearray(1000)))
    with pytest.raises(TimeoutError):
        place.get("file")
    with pytest.raises(TimeoutError):
        place.put("small", b"1")


def test_an_endpoint_may_end_with_a_slash(place, proxy):
    endpoint = f"http://127.0.0.1:{proxy.server_port}"
    storage.open(place.url.replace(endpoint, f"{endpoint}/")).put("file", b"1")
    assert proxy.asked.startswith("PUT /whalejax/")


def test_a_region_spares_the_question_for_it(place, proxy):
    proxy.faults = {"HEAD": [None]}
    assert place.size("file") is None
    assert proxy.faults == {"HEAD": [None]}
    assert storage.open(place.url.replace("&region=us-east-1", "")).size("file") is None
    assert proxy.faults == {"HEAD": []}


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", ".", "a/./b", "../a", "a/.."])
def test_a_name_that_leaves_the_place_is_refused(name):
    place = storage.open("memory://names")
    for call in (place.get, place.remove, lambda name: place.put(name, b"")):
        with pytest.raises(ValueError, match=f"'{name}' has an empty part"):
            call(name)
    for call in (place.names, place.folders, place.remove_tree):
        with pytest.raises(ValueError, match="has an empty part"):
            call(name or "/")
