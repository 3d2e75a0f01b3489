"""A headless Chromium that says what went wrong on a page.

It speaks Chromium's own DevTools protocol over a websocket. That needs no driver
program whose version has to match, and downloads nothing.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import websocket

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=1280,1000",
)
# Runs in the page: waits for its formulas and images, then reports.
REPORT = """
(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  return {
    images: images.length,
    broken: images.filter(image => !image.naturalWidth).map(image => image.src),
    formulas: document.querySelectorAll(".math").length,
    typeset: document.querySelectorAll("mjx-container").length,
    bad_formulas: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
  };
})()
"""


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome; $CHROMIUM names one that is elsewhere."""
    names = (os.environ.get("CHROMIUM", ""), *PROGRAMS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass
class Visit:
    """What happened on one page."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    report: dict = field(default_factory=dict)


class Browser:
    """One tab of a running Chromium."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60)
        self.last_id = 0
        self.visit = Visit()
        self.loaded: set[str] = set()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method: str, **params) -> dict:
        """Send a command and return its result; events on the way are noted."""
        self.last_id += 1
        wanted = self.last_id
        message = {"id": wanted, "method": method, "params": params}
        self.socket.send(json.dumps(message))
        while True:
            reply = self.receive()
            if reply.get("id") == wanted:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def receive(self) -> dict:
        """The next message; if it is an event, note it."""
        message = json.loads(self.socket.recv())
        self.note(message.get("method", ""), message.get("params", {}))
        return message

    def note(self, event: str, params: dict) -> None:
        """Keep what an event tells about the page."""
        match event:
            case "Page.lifecycleEvent" if params["name"] == "load":
                self.loaded.add(params["loaderId"])
            case "Network.requestWillBeSent":
                self.visit.requests.append(params["request"]["url"])
            case "Network.loadingFailed" if not params.get("canceled"):
                self.visit.errors.append(f"not loaded: {params['errorText']}")
            case "Runtime.exceptionThrown":
                detail = params["exceptionDetails"]
                text = detail.get("exception", {}).get("description", detail["text"])
                self.visit.errors.append(text)
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                words = [str(arg.get("value", arg)) for arg in params["args"]]
                self.visit.errors.append(" ".join(words))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                entry = params["entry"]
                self.visit.errors.append(f"{entry['text']} {entry.get('url', '')}")

    def open(self, url: str) -> Visit:
        """Open a page, wait until its formulas and images are there, and report."""
        self.visit = Visit()
        loader = self.call("Page.navigate", url=url)["loaderId"]
        while loader not in self.loaded:
            self.receive()
        result = self.call(
            "Runtime.evaluate", expression=REPORT, awaitPromise=True, returnByValue=True
        )
        self.visit.report = result["result"]["value"]
        return self.visit


@contextmanager
def chromium(program: str):
    """Start Chromium with a fresh profile; yield its tab; stop it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            browser = Browser(tab_address(Path(profile), process))
            try:
                yield browser
            finally:
                browser.socket.close()
        finally:
            process.terminate()
            process.wait(timeout=30)


def tab_address(profile: Path, process: subprocess.Popen) -> str:
    """The websocket of the first tab; Chromium writes the port into its profile."""
    port_file = profile / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with status {process.returncode}")
        if port_file.is_file() and (lines := port_file.read_text().splitlines()):
            tabs = f"http://127.0.0.1:{lines[0]}/json/list"
            with urllib.request.urlopen(tabs, timeout=30) as reply:
                for tab in json.load(reply):
                    if tab["type"] == "page":
                        return tab["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise RuntimeError("Chromium opened no page within 60 s")
