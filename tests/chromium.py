"""A headless Chromium, driven by the Chrome DevTools Protocol over a pipe: no port, no driver."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from itertools import count

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_TIMEOUT_S = 60


@contextmanager
def chromium(profile):
    """Starts a Chromium with a fresh profile and yields a page of it."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("there is no Chromium here: apt-get install -y chromium")
    to_read, to_write = os.pipe(), os.pipe()
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    redirect = f'exec "$@" 3<&{to_read[0]} 4>&{to_write[1]}'
    browser = subprocess.Popen(
        ["bash", "-c", redirect, "chromium", *command],
        pass_fds=(to_read[0], to_write[1]),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read[0])
    os.close(to_write[1])
    pipe = _Pipe(commands=to_read[1], answers=to_write[0])
    try:
        yield Page(pipe)
    finally:
        with suppress(BrokenPipeError):
            os.write(to_read[1], b'{"id": 0, "method": "Browser.close"}\0')
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
        os.close(to_read[1])
        os.close(to_write[0])


class _Pipe:
    """What all pages of a Chromium are asked through; events go to the page that they are of."""

    def __init__(self, commands, answers):
        self._commands = commands
        self._answers = answers
        self._ids = count(1)
        self._buffer = b""
        self.pages = {}

    def ask(self, method, params, session=None):
        """Sends a command and returns its result; passes on the events that come before it."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if page := self.pages.get(answer.get("sessionId")):
                page.note(answer)

    def _receive(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], _TIMEOUT_S)
            assert ready, "Chromium does not answer"
            part = os.read(self._answers, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


class Page:
    """A tab, its requests and the errors of its console."""

    def __init__(self, pipe):
        self._pipe = pipe
        self.requests = []
        self.errors = []
        self._target = pipe.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = pipe.ask("Target.attachToTarget", {"targetId": self._target, "flatten": True})
        self._session = attached["sessionId"]
        pipe.pages[self._session] = self
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.resize(1100, 760)

    def another(self):
        """Returns a second page of the same Chromium."""
        return Page(self._pipe)

    def close(self):
        """Closes the tab."""
        del self._pipe.pages[self._session]
        self._pipe.ask("Target.closeTarget", {"targetId": self._target})

    def call(self, method, **params):
        """Sends a command and returns its result."""
        return self._pipe.ask(method, params, self._session)

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Waits for an expression to be true and returns its value."""
        end = time.monotonic() + _TIMEOUT_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, expression
            time.sleep(0.02)
        return value

    def open(self, url):
        """Loads a page."""
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def resize(self, width, height):
        """Sets the size of the window."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def drop(self, path, selector):
        """Drags a file from outside onto the middle of an element, and lets go."""
        x, y = self.evaluate(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, path, selector):
        """Chooses a file in an <input type="file">."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key):
        """Presses a key by its name (`Enter`, `ArrowLeft`, `e`) and lets go."""
        event = {"key": key, "text": {"Enter": "\r"}.get(key, key if len(key) == 1 else "")}
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        event["windowsVirtualKeyCode"] = codes.get(key, ord(key[0].upper()))
        self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text):
        """Puts a text where the caret is."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """Writes a PNG of the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def note(self, event):
        """Keeps what an event says."""
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
