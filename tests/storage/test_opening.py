"""URLs, and the places that they mean."""

import os
import urllib.request
import uuid
from pathlib import Path

import pytest

from whalejax import storage


@pytest.mark.parametrize("form", ["{}/some place", "file://{}/some%20place"])
def test_a_path_is_a_folder(tmp_path, form):
    place = storage.open(form.format(tmp_path))
    place.put("file", b"1")
    assert (tmp_path / "some place/file").read_bytes() == b"1"
    assert (place.kind, place.renames, place.url) == ("disk", True, f"{tmp_path}/some place")


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [storage.open("a"), storage.open(Path("a"))]
    monkeypatch.chdir("/")
    assert [place.url for place in places] == [f"{tmp_path}/a"] * 2
    places[0].put("file", b"1")
    assert places[1].names("") == ["file"]


def test_memory_of_one_name_is_one_place():
    name = uuid.uuid4().hex
    storage.open(f"memory://{name}/a%20b/").put("file", b"1")
    assert storage.open(f"memory://{name}").names("") == ["a b/file"]
    assert storage.open(f"memory://{name}/a%20b").get("file") == b"1"
    assert storage.open(f"memory://{name[:-1]}").names("") == []
    assert storage.open(f"memory://{name}/a").names("") == []


def test_an_s3_prefix_is_a_folder(s3_url):
    place = storage.open(s3_url)
    assert (place.kind, place.renames, place.url) == ("s3", False, s3_url)
    bucket, options = s3_url.split("?")
    storage.open(f"{bucket}/a/100%25/?{options}").put("file", b"1")


def test_a_region_is_asked_for_where_none_is_given(s3_url):
    place = storage.open(s3_url.replace("&region=us-east-1", ""))
    place.put("file", b"1")
    assert storage.open(s3_url).get("file") == b"1"


def test_credentials_come_from_where_amazon_looks_for_them(s3_endpoint, s3_url, monkeypatch):
    """Moto lets anyone in who is someone, but no one else into a private bucket."""
    bucket = s3_url.replace("s3://whalejax/", "s3://of-someone/")
    request = urllib.request.Request(f"{s3_endpoint}/of-someone", method="PUT")
    urllib.request.urlopen(request).close()
    storage.open(bucket).put("file", b"1")
    with pytest.raises(PermissionError):
        storage.open(bucket).get("file")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert storage.open(bucket.replace("&anonymous=true", "")).get("file") == b"1"


def test_opening_a_bucket_asks_no_server():
    for url, kind in (
        ("gs://bucket/prefix", "gcs"),
        ("s3://bucket", "s3"),
        ("s3://bucket/?endpoint=http://127.0.0.1:1/", "s3"),
    ):
        place = storage.open(url)
        assert (place.url, place.kind, place.renames) == (url, kind, False)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://host/x", r"unknown scheme 'ftp' in 'ftp://host/x'; known: .*'gs', 'memory', 's3'"),
        ("s3://", "'s3://' has no name after ://"),
        ("gs:///prefix", "'gs:///prefix' has no name after ://"),
        ("memory:///x", "has no name after ://"),
        ("s3://Not_A_Bucket!/x", 'Invalid S3 bucket name: "Not_A_Bucket!"'),
        ("gs://B/x", 'gs://B/x.*Invalid GCS bucket name: "B"'),
        ("s3://bucket?zone=x&region=y", r"unknown options \['zone'\] in .*known: .*region"),
        ("gs://bucket?endpoint=http://h", r"unknown options \['endpoint'\]"),
        ("memory://name?x=", r"unknown options \['x'\]"),
        ("file:///x?y=z", r"unknown options \['y'\]"),
        ("s3://bucket?region=a&region=b", "given twice or empty: .*'a'.*'b'"),
        ("s3://bucket?region=", "given twice or empty"),
        ("s3://bucket?anonymous=yes", "anonymous='yes' in .*only 'true'"),
        ("s3://bucket?endpoint=localhost:9000", "Endpoint localhost:9000 has invalid scheme"),
        ("s3://bucket/a#b", "has a fragment, 'b'"),
        ("file://host/x", "its host is 'host'"),
        ("file://", "is no file:///path"),
        ("s3:/bucket/x", "'s3:/bucket/x' looks like a s3:// URL that went through pathlib"),
        (Path("gs://bucket"), "'gs:/bucket' looks like a gs:// URL"),
    ],
    ids=str,
)
def test_a_url_that_means_nothing_is_printed(url, complaint):
    with pytest.raises(ValueError, match=complaint):
        storage.open(url)
    assert not os.path.exists("s3:")
