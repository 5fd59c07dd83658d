"""A headless Chromium for tests, driven over its own debugging pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A page of some megabytes loads in a second or two; a machine that is busy with other tests may take ten times that.
_PATIENCE = 60.0
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, which Chromium refuses otherwise; the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The protocol's two ends are the browser's file descriptors 3 and 4. The first of two pipes is the lower one, so that
# the second is never written over; a shell could do the same for descriptors of one digit only.
_STARTER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One browser process; every page is a tab of it."""

    def __init__(self, executable: str, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        command = [sys.executable, "-I", "-S", "-c", _STARTER, str(ours[0]), str(theirs[1]), executable]
        command += [*_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        none = subprocess.DEVNULL
        ends = (ours[0], theirs[1])
        self._process = subprocess.Popen(command, pass_fds=ends, stdin=none, stdout=none, stderr=none)
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from, self._rest = ours[1], theirs[0], b""
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; events that come meanwhile are kept."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            return answer["result"]

    def wait_for(self, method: str, session: str) -> None:
        """Waits for an event of a tab."""
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser was silent for {_PATIENCE:.0f} s"
            piece = os.read(self._from, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, file: Path, *, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        """Opens a file from disk in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", session, **size)
        page = Page(self, session, target)
        page.emulate(dark=dark)
        self.send("Page.navigate", session, url=file.absolute().as_uri())
        self.wait_for("Page.loadEventFired", session)
        return page

    def close(self) -> None:
        """Ends the process."""
        try:
            os.write(self._to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def emulate(self, *, dark: bool = False, printed: bool = False) -> None:
        """What the reader's system prefers, and whether the page is for paper."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        media = "print" if printed else "screen"
        self._browser.send("Emulation.setEmulatedMedia", self._session, media=media, features=features)

    def reload(self) -> None:
        """Opens the same page once more, in the same tab."""
        before = self._browser.events
        self._browser.events = [e for e in before if e.get("method") != "Page.loadEventFired"]
        self._browser.send("Page.reload", self._session)
        self._browser.wait_for("Page.loadEventFired", self._session)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._browser.send("Runtime.evaluate", self._session, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, *, code: int = 0, text: str = "") -> None:
        """Presses and releases a key, as a person would."""
        for kind in ("keyDown", "keyUp"):
            options = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self._browser.send("Input.dispatchKeyEvent", self._session, **options, **({"text": text} if text else {}))

    def point_at(self, selector: str) -> None:
        """Moves the mouse over an element."""
        at = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        # The scrolling's own event, which hides a tip, is dispatched with the next frame.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self._browser.send("Input.dispatchMouseEvent", self._session, type="mouseMoved", x=at[0], y=at[1])

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._browser.send("Page.captureScreenshot", self._session, format="png")["data"])

    @property
    def complaints(self) -> list[str]:
        """Uncaught exceptions, console messages and log entries of this tab so far."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(e["params"])[:600] for e in self._events() if e["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """Every address that this tab asked for."""
        return [e["params"]["request"]["url"] for e in self._events() if e["method"] == "Network.requestWillBeSent"]

    def _events(self) -> list[dict[str, Any]]:
        return [e for e in self._browser.events if e.get("sessionId") == self._session]

    def close(self) -> None:
        """Closes the tab."""
        self._browser.send("Target.closeTarget", targetId=self._target)
