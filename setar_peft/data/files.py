"""Encoded images as binary files, from a path, a URL or bytes; what of theirs is a name."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from errno import ENAMETOOLONG
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import quote

LARGEST_DOWNLOAD = 64 * 2**20  # bytes
SILENCE_OF_SERVER = 20.0  # seconds without a byte
LONGEST_DOWNLOAD = 120.0  # seconds
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_SHOWN = 200
_Bytes = (bytes, bytearray, memoryview)


def is_url(text: str) -> bool:
    """Whether a string is a URL of any kind, also of those that are not fetched."""
    return _URL.match(text) is not None


def name_of(image: Any) -> str | None:
    """The path or URL of an image, where it has one; None also for a string that is no sensible path."""
    if isinstance(image, Mapping):
        image = image.get("path")
    elif not isinstance(image, (str, Path)):
        image = getattr(image, "filename", None)
    name = str(image) if isinstance(image, (str, Path)) else ""
    return name if name and "\0" not in name and not name.startswith("data:") and len(name) < 4096 else None


def is_encoded(image: Any) -> bool:
    """Whether an image is still encoded: a path, a URL, bytes, or a mapping with "bytes" and "path" alone."""
    if isinstance(image, Mapping):
        return bool(image) and set(image) <= {"bytes", "path"}
    return isinstance(image, (str, Path, io.BytesIO, *_Bytes))


def opened(image: Any) -> IO[bytes]:
    """An encoded image as a file to read.

    Args:
        image: A path; a URL (http or https), of which at most `LARGEST_DOWNLOAD` bytes are fetched; encoded bytes; or a
                mapping with "bytes" or "path", an undecoded image of `datasets`.

    Raises:
        ValueError: If there is no such file, or the URL does not give one.
        OSError: If it cannot be opened.
    """
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, io.BytesIO):
        image = image.getvalue()
    if isinstance(image, _Bytes):
        return io.BytesIO(image)
    if isinstance(image, str) and is_url(image):
        return io.BytesIO(_fetched(image))
    if not isinstance(image, (str, Path)) or not str(image).strip():
        raise ValueError(f"{image!r:.80} is no path; give a path, a URL, or encoded bytes")
    if re.match(r"https?:/", str(image)):
        raise ValueError("it is a Path made of a URL, which has lost a slash; give the URL as a string")
    path = Path(image)
    try:
        # A pipe or a device would be read for ever.
        if path.is_file():
            return path.open("rb")
        kind = "it is a folder; give the image files in it" if path.is_dir() else "it is no regular file"
        exists = path.exists()
    except (OSError, ValueError) as error:
        # Zeros and names that are too long: strings that are no paths.
        if getattr(error, "errno", ENAMETOOLONG) != ENAMETOOLONG:
            raise
        exists = False
    raise ValueError(kind if exists else f"No such file: {str(image)[:_SHOWN]!r}")


def _fetched(url: str) -> bytes:
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ValueError(
            f"{url.split(':')[0]!r} URLs are not fetched; give http or https, a path, or the encoded bytes"
        )
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    asked = request.Request(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "setar_peft"})
    end = time.monotonic() + LONGEST_DOWNLOAD
    content = bytearray()
    try:
        with opener.open(asked, timeout=SILENCE_OF_SERVER) as answer:
            expected = answer.headers.get("Content-Length")
            if expected is not None and int(expected) > LARGEST_DOWNLOAD:
                raise ValueError(f"it has {expected} bytes, more than the {LARGEST_DOWNLOAD} that are fetched")
            # Not `read`, which waits for all that it is asked for, however slowly it comes.
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > LARGEST_DOWNLOAD:
                    raise ValueError(f"it has more than the {LARGEST_DOWNLOAD} bytes that are fetched")
                if time.monotonic() > end:
                    raise ValueError(f"it was not there after {LONGEST_DOWNLOAD:g} s ({len(content)} bytes were)")
            if expected is not None and len(content) < int(expected):
                raise ValueError(f"it ended after {len(content)} of {expected} bytes")
    except HTTPError as error:
        error.close()
        raise ValueError(f"the server answers {error.code} {error.reason}") from error
    except URLError as error:
        raise ValueError(f"it cannot be fetched: {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise ValueError(f"it cannot be fetched: {str(error) or type(error).__name__}") from error
    return bytes(content)
