"""A headless Chromium for the tests of pages; the machine's own, which Playwright drives."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Every visible text: its contrast with what lies behind it (WCAG 2), and whether it leaves the window or its drawing.
TEXTS = """() => {
  const parse = color => { const n = color.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color[3] === 1) return color;
      if (color[3] !== 0) throw new Error('a background that is half transparent');
    }
    throw new Error('no background');
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement, style = getComputedStyle(element);
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!node.textContent.trim() || !box.width) continue;
    const drawing = element.closest('svg'), frame = drawing ? drawing.getBoundingClientRect() : {left: 0, right: innerWidth};
    const a = light(parse(drawing ? style.fill : style.color)), b = light(behind(element));
    found.push({
      text: node.textContent.trim(),
      contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      inside: box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.right <= innerWidth + 1,
      size: parseFloat(style.fontSize) * (drawing ? drawing.getScreenCTM().a : 1),
    });
  }
  return found;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser; skips the test where Playwright or a browser is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'duq-vla[dev]'"
    )
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Shown:
    """A page in a window: what it asked for and what went wrong; and, at each size and color scheme, how it looks."""

    def __init__(self, browser: Any, file: Path):
        self.page = browser.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(file.as_uri())

    def resize(self, width: int, height: int, scheme: str) -> None:
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)

    def texts(self) -> list[dict]:
        """Each visible "text": its "contrast", "size" in pixels, and whether it is "inside" the window and its drawing."""
        return self.page.evaluate(TEXTS)

    def document_width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")

    def bottom(self, selector: str) -> float:
        """Of an element, in pixels from the top of the window."""
        box = self.page.locator(selector).bounding_box()
        return box["y"] + box["height"]

    def screenshot(self) -> np.ndarray:
        """The window's pixels in gray, uint8 [height, width]."""
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("L"))
