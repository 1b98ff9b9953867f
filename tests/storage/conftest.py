"""As much of Google Cloud Storage's JSON API as TensorStore's client asks for, over a dict."""

import itertools
import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

PAGE = 1000  # names in one answer to a listing, as of the real one


class CloudStorage(BaseHTTPRequestHandler):
    """`server.objects` maps names to bytes and generation; one bucket, `whalejax`.

    `server.refusal` is the status of every answer, if not None.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer's body would wait 40 ms behind its head

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        if bucket != "whalejax":
            return self.answer(404, {"error": {"message": f"no bucket {bucket}"}})
        if self.server.refusal:
            return self.answer(self.server.refusal, {"error": {"message": "refused"}})
        with self.server.turn:
            if self.command == "POST":
                return self.upload(query, body)
            if not name:
                return self.list(query)
            return self.serve_object(unquote(name[1:]), query)

    do_GET = do_POST = do_DELETE = serve

    def upload(self, query, body):
        objects, name = self.server.objects, query["name"]
        if query.get("ifGenerationMatch") == "0" and name in objects:
            return self.answer(412, {"error": {"message": "conditionNotMet"}})
        objects[name] = body, next(self.server.generations)
        self.answer(200, {"name": name, "generation": str(objects[name][1])})

    def list(self, query):
        names = sorted(self.server.objects)
        start, end = query.get("startOffset", ""), query.get("endOffset")
        names = [name for name in names if name >= start and (not end or name < end)]
        skip = int(query.get("pageToken", 0))
        answer = {"items": [{"name": name} for name in names[skip : skip + PAGE]]}
        if len(names) > skip + PAGE:
            answer["nextPageToken"] = str(skip + PAGE)
        self.answer(200, answer)

    def serve_object(self, name, query):
        if name not in self.server.objects:
            return self.answer(404, {"error": {"message": f"no object {name}"}})
        if self.command == "DELETE":
            del self.server.objects[name]
            return self.answer(204, None)
        data, generation = self.server.objects[name]
        self.answer(200, data, generation)

    def answer(self, status, data, generation=0):
        body = data if isinstance(data, bytes) else json.dumps(data).encode() if data else b""
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[ThreadingHTTPServer]:
    """The server, whose `objects` are all that it holds."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), CloudStorage)
    server.objects, server.generations = {}, itertools.count(1)
    server.turn, server.refusal = threading.Lock(), None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def gcs_url(gcs_server, monkeypatch) -> str:
    """A prefix that holds nothing, for `whalejax.storage.open`."""
    url = f"http://127.0.0.1:{gcs_server.server_port}"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    return f"gs://whalejax/{uuid.uuid4().hex}"
