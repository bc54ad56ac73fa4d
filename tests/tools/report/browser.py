"""A headless Chromium, driven over its pipe of JSON messages, and all that it complains of."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Timer
from typing import IO, Any

from PIL import Image

_MAX_SECONDS = 300
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The first Chromium on the path."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A tab.

    Attributes:
        events: all that the browser has told so far, as (method, parameters).
    """

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers = commands, answers
        self._num_calls = 0
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and return its result."""
        self._num_calls += 1
        message = {"id": self._num_calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._num_calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path) -> None:
        """Load a file by its address, and wait until it is there."""
        seen = len(self.events)
        self.call("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events[seen:]):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """Compute an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def photograph(self, box: dict[str, float]) -> Image.Image:
        """Take a picture of a part of the page, ``x, y, width, height`` in its pixels."""
        clip = {**box, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return Image.open(BytesIO(base64.b64decode(shot["data"])))

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """What the console holds: messages, log entries, exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [parameters for method, parameters in self.events if method in kinds]

    @property
    def addresses(self) -> set[str]:
        """What was asked for, apart from data inside the page."""
        asked = [p["request"]["url"] for m, p in self.events if m == "Network.requestWillBeSent"]
        return {address for address in asked if not address.startswith("data:")}

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            text += byte
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


@contextmanager
def open_browser(binary: str, profile: Path) -> Iterator[Page]:
    """Start a browser with an empty profile; it is gone at the end of the block."""
    ours, theirs = os.pipe(), os.pipe()  # what it reads, what it writes

    def place_pipes() -> None:
        # It expects them at 3 and 4, which may be taken by their own other ends.
        reads, writes = os.dup(ours[0]), os.dup(theirs[1])
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [binary, *words, f"--user-data-dir={profile}"],
        preexec_fn=place_pipes,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(ours[0])
    os.close(theirs[1])
    # A browser that hangs would have the test wait for its answer for ever.
    guard = Timer(_MAX_SECONDS, process.kill)
    guard.start()
    try:
        with open(ours[1], "wb") as commands, open(theirs[0], "rb", buffering=2**16) as answers:
            yield Page(commands, answers)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
