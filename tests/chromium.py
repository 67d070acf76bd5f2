"""A headless Chromium, driven by its DevTools protocol over a pipe: nothing to install besides the browser."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PATH = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    PATH is None, reason="no chromium here (Debian: apt install chromium)"
)
TIMEOUT = 60
# Ends of the pipes as Chromium expects them.
IN, OUT = 3, 4


class Browser:
    """One browser with one page at a time.

    Args:
        profile: Folder for its files.
    """

    def __init__(self, profile: Path):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        command = [
            "bash", "-c", f'exec "$@" {IN}<&{to_browser} {OUT}>&{from_browser}', "bash", PATH, "--headless",
            "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
            "--remote-debugging-pipe", f"--user-data-dir={profile}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._last = b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []  # errors, warnings and dialogs of the page

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file in a new page, and wait until it is there."""
        target = self.call("Target.createTarget", url="about:blank", alone=True)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True, alone=True)
        self._session, self.complaints = attached["sessionId"], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def press(self, key: str, code: int) -> None:
        """A key, typed as a user does."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)  # fmt: skip
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)  # fmt: skip

    def call(self, method: str, alone: bool = False, **parameters):
        """A command of the protocol, and its answer; events that come meanwhile are looked at."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if not alone:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._look_at(answer)

    def _next(self) -> dict:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "Chromium says nothing"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _look_at(self, event: dict) -> None:
        method, found = event["method"], event.get("params", {})
        if method == "Log.entryAdded":
            self.complaints.append(f"{found['entry']['level']}: {found['entry']['text']}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(found["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {found['args']}")
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {found['message']}")
            self._last += 1
            accept = {"id": self._last, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}, "sessionId": self._session}  # fmt: skip
            os.write(self._write, json.dumps(accept).encode() + b"\0")
        elif method == "Network.requestWillBeSent":
            url = found["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self.complaints.append(f"asked the network for {url}")

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(timeout=TIMEOUT)
