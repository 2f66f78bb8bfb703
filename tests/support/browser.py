"""A real browser without a window, for the live page. Needs Chromium and its driver."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

LAPTOP, PHONE = (1280, 800), (390, 844)
"""Sizes of a page in CSS pixels."""
_WAIT_S = 30.0
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)

# The first background behind an element that is not see-through.
_COLOURS = """
const behind = node => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
return [...document.querySelectorAll(arguments[0])].filter(node => node.offsetParent)
  .map(node => [node.textContent, getComputedStyle(node).color, behind(node)]);
"""
_TOO_WIDE = """
const width = document.documentElement.clientWidth;
const wide = [...document.body.querySelectorAll("*")].filter(node =>
  node.offsetParent && node.getBoundingClientRect().right > width + 0.5);
const cut = [...document.querySelectorAll("dd, dt, button, th, td, label")].filter(node =>
  node.offsetParent && node.scrollWidth > node.clientWidth + 1);
return [...wide, ...cut].map(node => node.outerHTML.slice(0, 80));
"""


def missing() -> str | None:
    """Say what a test with a browser lacks on this machine."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} is installed" if lacking else None


class Browser:
    """One page in it, at a time."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        """Open a page."""
        self._driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript; returns what it returns."""
        return self._driver.execute_script(script, *arguments)

    def value(self, expression: str) -> Any:
        """Evaluate JavaScript."""
        return self.run(f"return {expression}")

    def until(self, expression: str) -> None:
        """Wait until JavaScript is true."""
        waiting = WebDriverWait(self._driver, _WAIT_S, poll_frequency=0.05)
        waiting.until(lambda _: self.value(expression), f"never true: {expression}")

    def text(self, name: str) -> str:
        """The text of the element with this id, whether it can be seen or not."""
        return str(self.value(f"document.getElementById({name!r}).textContent"))

    def type(self, name: str, text: str) -> None:
        """Replace what is in a field, key by key."""
        field = self._driver.find_element("id", name)
        field.clear()
        field.send_keys(text)

    def choose(self, name: str, value: str) -> None:
        """Choose from a list."""
        self._driver.find_element("css selector", f"#{name} option[value={value!r}]").click()

    def click(self, selector: str) -> None:
        """Click what a person would click."""
        self._driver.find_element("css selector", selector).click()

    def resize(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Be a screen of this size, of somebody who likes it light or dark."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def too_wide(self) -> list[str]:
        """What does not fit: elements that leave the page, and texts that leave their boxes."""
        return list(self.run(_TOO_WIDE))

    def contrast_min(self, selector: str) -> float:
        """The least contrast (WCAG) of text in elements that can be seen."""
        found = self.run(_COLOURS, selector)
        assert found, f"nothing to see of {selector}"
        return min(_contrast(text, paper) for _, text, paper in found)

    def complaints(self) -> list[str]:
        """What the console said since it was asked last."""
        entries: list[dict[str, Any]] = self._driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]

    def screenshot(self, path: Path) -> None:
        """Write what is to be seen, as a PNG."""
        assert self._driver.save_screenshot(str(path))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Run a browser whose profile is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Named, so that selenium does not go and fetch one.
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _contrast(one: str, other: str) -> float:
    dark, light = sorted(_luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of "rgb(1, 2, 3)"."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
