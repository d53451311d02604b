"""Chromium without a window, asked through its debugging protocol over two pipes.

The package is `chromium` on Debian. Nothing is fetched from anywhere.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WAIT_S = 120  # of a loaded machine


class Browser:
    """A browser with one page."""

    def __init__(self):
        assert PROGRAM, "Chromium is not there: apt-get install chromium"
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self.to = os.pipe()
        self.back, write = os.pipe()
        command = [
            PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={self.folder.name}", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', *command],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        os.set_blocking(self.back, False)
        self.held, self.number, self.session, self.events = b"", 0, None, []
        (target,) = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.folder.cleanup()

    def ask(self, method, **parameters):
        """The result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self._until(lambda told: told.get("id") == self.number)["result"]

    def _until(self, wanted):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            line, found, rest = self.held.partition(b"\0")
            if found:
                self.held = rest
                told = json.loads(line)
                assert "error" not in told, told
                if "method" in told:
                    self.events.append(told)
                if wanted(told):
                    return told
                continue
            try:
                piece = os.read(self.back, 1 << 20)
                assert piece, "the browser has ended"
                self.held += piece
            except BlockingIOError:
                time.sleep(0.01)
        raise TimeoutError("the browser does not answer")

    def open(self, url, width, *, height=1600, media="screen", scheme="light"):
        """Show a page; what happened meanwhile is in `events`."""
        self.events = []
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.ask("Page.navigate", url=url)
        if not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a piece of JavaScript in the page."""
        told = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def complaints(self):
        """What the page has said on the console, and what has gone wrong in it."""
        names = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event for event in self.events if event["method"] in names]

    def requests(self):
        """Everything that was asked of the network or the disk."""
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        urls = (event["params"]["request"]["url"] for event in sent)
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self):
        """What is seen of the page, as PNG bytes."""
        told = self.ask("Page.captureScreenshot", format="png")
        return base64.b64decode(told["data"])
