"""Encoded images: files, bytes, and URLs that give what they should, give something else, or do not answer."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from setar_peft.data import files
from setar_peft.data.files import is_encoded, is_url, name_of, opened
from setar_peft.data.images import ImageSource

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def png() -> bytes:
    data = io.BytesIO()
    PICTURE.save(data, "PNG")
    return data.getvalue()


class Web(BaseHTTPRequestHandler):
    """What there is on the web."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/a.png", "/a%20b%C3%A9.png"):
            self.answer(200, png())
        elif path == "/moved.png":
            self.answer(302, b"", Location="/a.png")
        elif path == "/elsewhere.png":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif path == "/ftp.png":
            self.answer(302, b"", Location="ftp://127.0.0.1/a.png")
        elif path == "/round.png":
            self.answer(302, b"", Location="/round.png")
        elif path == "/page.png":
            self.answer(200, b"<!DOCTYPE html><title>Log in</title>")
        elif path == "/empty.png":
            self.answer(200, b"")
        elif path == "/agent.png":
            self.answer(200 if "setar" in self.headers["User-Agent"] else 403, png())
        elif path == "/cut.png":
            self.answer(200, png()[:-100], length=len(png()))
        elif path == "/strange.png":
            self.answer(200, png(), length="many")
        elif path == "/large.png":
            self.answer(200, b"\0" * 5000)
        elif path == "/endless.png":
            self.answer(200, b"\0" * 5000, length=None)
        elif path == "/slow.png":
            self.answer(200, b"\0", length=100)
            for _ in range(50):
                time.sleep(0.02)
                self.wfile.write(b"\0")
        elif path == "/silent.png":
            time.sleep(1)
        elif path == "/gone.png":
            self.close_connection = True
        else:
            self.answer(int(path.strip("/")) if path.strip("/").isdigit() else 404, b"no")

    def answer(self, status: int, content: bytes, length: Any = 0, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length or len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(files, "SILENCE_OF_SERVER", 0.3)
    monkeypatch.setattr(files, "LONGEST_DOWNLOAD", 0.4)
    monkeypatch.setattr(files, "LARGEST_DOWNLOAD", 4000)


def test_a_url_is_an_image_as_its_file_is(web: str, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    urls = [f"{web}/{path}" for path in ("a.png", "moved.png", "a bé.png", "a.png?size=2#top", "agent.png")]
    ways = [*urls, {"path": urls[0]}, {"path": urls[0], "bytes": None}, tmp_path / "a.png", png(), bytearray(png())]
    source = ImageSource(processor, [*ways, memoryview(png()), io.BytesIO(png())])
    (pixels, _), *_ = source.batches()
    assert len(pixels) == 12
    assert (pixels == pixels[0]).all()
    assert [source.name(number) for number in range(7)] == [*urls, urls[0], urls[0]]
    assert [source.name(number) for number in range(7, 10)] == [str(tmp_path / "a.png"), "8", "9"]
    # Again: nothing is used up by reading.
    assert (next(source.batches())[0] == pixels).all()


@pytest.mark.parametrize(
    ("path", "piece"),
    [
        ("nowhere.png", "the server answers 404 Not Found"),
        ("403", "the server answers 403 Forbidden"),
        ("500", "the server answers 500 Internal Server Error"),
        ("round.png", "the server answers 302"),
        ("elsewhere.png", "the server answers 302"),
        ("ftp.png", "it cannot be fetched: unknown url type: ftp"),
        ("page.png", "PIL cannot identify it as an image: it begins with b'<!DOCTYPE html><'"),
        ("empty.png", "PIL cannot identify it as an image: it is empty"),
        ("large.png", "it has 5000 bytes, more than the 4000 that are fetched"),
        ("endless.png", "it has more than the 4000 bytes that are fetched"),
        ("slow.png", r"it was not there after 0\.4 s \(\d+ bytes were\)"),
        ("silent.png", "it cannot be fetched: timed out"),
        ("gone.png", "it cannot be fetched: Remote end closed connection"),
        ("cut.png", r"it ended after \d+ of \d+ bytes"),
        ("strange.png", "invalid literal for int"),
    ],
)
def test_a_url_that_fails_is_a_sentence_and_the_others_go_on(web: str, processor: Any, path: str, piece: str) -> None:
    source = ImageSource(processor, [f"{web}/a.png", f"{web}/{path}", png()])
    (batch,) = source.readable_batches()
    assert batch.numbers == [0, 2]
    assert list(batch.errors) == [1]
    with pytest.raises(ValueError, match=rf"^http://127\.0\.0\.1:\d+/{path} cannot be read: .*{piece}"):
        raise ValueError(batch.errors[1])


@pytest.mark.parametrize(
    ("url", "piece"),
    [
        ("http://127.0.0.1:9/a.png", "it cannot be fetched: .*refused"),
        ("http://", "it cannot be fetched: no host given"),
        ("http://a:b/", "it cannot be fetched: nonnumeric port"),
        ("ftp://127.0.0.1/a.png", "'ftp' URLs are not fetched; give http or https"),
        ("file:///etc/hostname", "'file' URLs are not fetched"),
        ("s3://bucket/a.png", "'s3' URLs are not fetched"),
        ("data:image/png;base64,AAAA", "'data' URLs are not fetched"),
        (Path("https://a.b/c.png"), "it is a Path made of a URL, which has lost a slash; give the URL as a string"),
        (Path("nowhere.png"), "No such file: 'nowhere.png'"),
        ("nowhere/a.png", "No such file: 'nowhere/a.png'"),
        ("a\0b.png", "No such file"),
        ("iVBORw0KGgo" * 1000, "No such file: 'iVBORw0KGgo"),
        ("", "'' is no path"),
        (" ", "' ' is no path"),
        ("/dev/zero", "it is no regular file"),
        (Path("/"), "it is a folder; give the image files in it"),
        ({"path": None, "bytes": None}, "None is no path"),
        ({"path": 3}, "3 is no path"),
    ],
)
def test_what_is_no_file_is_a_sentence(url: Any, piece: str) -> None:
    assert is_encoded(url)
    with pytest.raises(ValueError, match=piece) as error:
        opened(url)
    assert len(str(error.value)) < 300


def test_a_host_that_is_not_known_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"it cannot be fetched: .*Name or service not known"):
        opened("http://nowhere.invalid/a.png")


def test_what_is_a_url_or_a_name() -> None:
    assert is_url("https://a.b/c.png")
    assert is_url("s3://a/b")
    assert not is_url("a/b.png")
    assert not is_url("C:\\a.png")
    assert name_of({"bytes": b"", "path": "a.png"}) == "a.png"
    assert name_of(PICTURE) is None
    assert name_of("iVBORw0KGgo" * 1000) is None
    assert name_of("data:image/png;base64,AAAA") is None
    assert not is_encoded({"path": "a.png", "label": 1})
    assert not is_encoded({})
    assert not is_encoded(PICTURE)
