"""A page in a real browser: Chromium without a window, spoken to over two pipes by its own protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """A page that is open.

    Attributes:
        messages: What was written to its console, and errors of the browser about it.
        requests: Addresses that it asked for, itself included.
    """

    def __init__(self, command: BinaryIO, answers: BinaryIO) -> None:
        self._command, self._answers = command, answers
        self._number = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.messages: list[str] = []
        self.requests: list[str] = []

    def open(self, path: Path, *, dark: bool = False) -> None:
        """Open a file and wait until it is loaded."""
        self._session, self._events = None, []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        if dark:
            self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        self._call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        # Whatever else it has to say comes before the answer.
        self.evaluate("new Promise(done => setTimeout(done, 200))")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def width(self, pixels: int) -> None:
        """Make the window that wide."""
        self._call("Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1, mobile=False)

    def screenshot(self, path: Path, width: int = 1200) -> None:
        """Write a picture of the whole page."""
        self.width(width)
        found = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def print(self, path: Path) -> None:
        """Write the page as a PDF."""
        path.write_bytes(base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._command.write(json.dumps(message).encode() + b"\0")
        self._command.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser is gone"
            text += byte
        message = json.loads(text)
        self._events.append(message if "method" in message else {"method": ""})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(str(message["params"]["args"]))
        elif message.get("method") == "Log.entryAdded":
            self.messages.append(message["params"]["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser, which is ended at the end; the test is skipped where there is none.

    Args:
        folder: For what the browser keeps.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(_NAMES)} is installed")
    command, commands = os.pipe()
    answers, answer = os.pipe()
    # Chromium reads commands from file 3 and answers on file 4.
    flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    script = f'exec "$0" {flags} --user-data-dir="$1" about:blank 3<&{command} 4>&{answer}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, str(folder / "profile")],
        pass_fds=(command, answer),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command)
    os.close(answer)
    try:
        with os.fdopen(commands, "wb") as writing, os.fdopen(answers, "rb") as reading:
            yield Page(writing, reading)
    finally:
        process.terminate()
        process.wait(20)
