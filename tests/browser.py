"""A real Chromium without a window."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

AXE = Path(__file__).with_name("assets") / "axe.min.js"
WAIT_S = 30.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def look(self, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Be a screen of this size and colour scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script's body in the page."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until a script returns something true; return it."""
        waiting: Callable[[Any], Any] = lambda _: self.run(script, *arguments)  # noqa: E731
        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(waiting, script)

    def complaints(self) -> list[str]:
        """Return what the console has said since it was last asked, violations of CSP included."""
        told = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in told]

    def leave(self) -> None:
        """Leave the page, and forget what it said: its controller may be gone since."""
        self.driver.get("about:blank")
        self.complaints()

    def violations(self) -> list[str]:
        """Return what axe finds wrong with the page for those who cannot see it or use a mouse."""
        source = AXE.read_text(encoding="utf-8")
        self.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": source})
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then((told) => done(told.violations.map((each) =>"
            " `${each.id}: ${each.nodes.map((node) => node.html).slice(0, 3).join(' | ')}`)));"
        )
        return [str(each) for each in found]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start one; skip the test loudly where there is none."""
    driver = shutil.which("chromedriver")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if driver is None or program is None:
        pytest.skip("there is no Chromium with its driver on this machine: `make test-page`")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.accept_insecure_certs = True
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(started)
    finally:
        started.quit()
