"""A headless Chromium for tests: chromedriver spoken to over plain HTTP, as W3C's WebDriver standard says.

    with browser.open(width=1200, height=800, dark=True) as page:
        page.go(path.as_uri())
        assert page.run("return document.title") == "..."

Needs Debian's packages chromium and chromium-driver (tests/chromium.sh). It does not wait for anything by itself but a
page's load; `wait` does, for an expression to be true.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Iterator

KEYS = {"Escape": "\ue00c", "Enter": "\ue007", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}


def missing() -> str | None:
    """Why there is no browser; None if there is one."""
    absent = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"no {' and no '.join(absent)}: tests/chromium.sh installs them" if absent else None


class Page:
    def __init__(self, session: str):
        self.session = session  # the address of the session

    def go(self, address: str) -> None:
        call("POST", f"{self.session}/url", {"url": address})

    def run(self, script: str, *values):
        """What the script returns; a promise is waited for."""
        return call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(values)})

    def wait(self, expression: str, seconds: float = 10.0):
        """The value of a JavaScript expression as soon as it is true. Raises AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {expression}")):
            assert time.monotonic() < end, f"after {seconds} s still not true: {expression}"
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Real key strokes, one after the other: characters, or names in KEYS."""
        strokes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": key} for key in strokes for kind in ("keyDown", "keyUp")]
        call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, selector: str) -> None:
        """A real click on the first element that matches, away from the window's edges and what lies over them."""
        self.run(
            "document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector
        )
        found = call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        call("POST", f"{self.session}/element/{next(iter(found.values()))}/click", {})

    def resize(self, width: int, height: int) -> None:
        """Of what is seen of the page; Chromium's own windows are never narrower than 500."""
        parameters = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome("Emulation.setDeviceMetricsOverride", **parameters)

    def dark(self, yes: bool) -> None:
        """What the system asks for."""
        self.media(**{"prefers-color-scheme": "dark" if yes else "light"})

    def media(self, **features: str) -> None:
        self.chrome(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )

    def chrome(self, command: str, **parameters):
        """A command of Chromium's own protocol."""
        return call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self) -> list[dict]:
        """What the page's console got since the last call, errors and refusals of the security policy among it."""
        return call("POST", f"{self.session}/se/log", {"type": "browser"})

    def picture(self, path: str | Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        shot = self.chrome("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def open(width: int = 1200, height: int = 800, dark: bool = False) -> Iterator[Page]:  # noqa: A001
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    page = None
    with tempfile.TemporaryDirectory() as profile:
        try:
            page = Page(_session(f"http://127.0.0.1:{port}", profile, driver))
            page.resize(width, height)
            page.dark(dark)
            yield page
        finally:
            if page:
                with contextlib.suppress(OSError):
                    call("DELETE", page.session)
            driver.terminate()
            driver.wait()


def _session(server: str, profile: str, driver: subprocess.Popen) -> str:
    flags = ["--headless=new", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu",
             "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
             "--hide-scrollbars"]  # fmt: skip
    flags += ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium refuses its sandbox to root
    wanted = {"alwaysMatch": {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}}
    end = time.monotonic() + 30
    while True:
        try:
            made = call("POST", f"{server}/session", {"capabilities": wanted})
            return f"{server}/session/{made['sessionId']}"
        except ConnectionError:  # not yet listening
            assert driver.poll() is None and time.monotonic() < end, "chromedriver did not start"
            time.sleep(0.05)


def call(method: str, address: str, content: dict | None = None):
    """One command; its value. Raises AssertionError with the driver's own words."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{address}: {json.load(error)['value']['message']}") from None
    except urllib.error.URLError as error:
        raise error.reason from None
