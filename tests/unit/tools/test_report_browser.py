"""The report in a real browser: nothing on the console, readable at 400 px and 1400 px, and in print."""

from __future__ import annotations

import html
import json
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from tests.unit.report.written_runs import write_run
from tests.unit.tools.test_report import course
from tools.report import main

WIDTHS = (400, 1400)
NAMES = ("chromium", "chromium-browser", "google-chrome")
SMALLEST_TEXT_PX = 9.0
MEASURE = """
<script>
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll('figure svg text')].filter(t => t.textContent);
  const shown = [...page.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect());
  return {
    overflow: root.scrollWidth - root.clientWidth,
    smallest: Math.min(...texts.map(t => {
      const m = t.getScreenCTM();
      return parseFloat(getComputedStyle(t).fontSize) * Math.hypot(m.a, m.b);
    })),
    widths: shown.map(r => r.width), heights: shown.map(r => r.height),
    scrolled: [...page.querySelectorAll('table')].map(t => {
      const box = t.parentElement;
      box.scrollLeft = 1e6;
      return [t.scrollWidth - box.clientWidth, box.scrollLeft];
    }),
    columns: new Set(shown.map(r => Math.round(r.left))).size,
  };
}
addEventListener('load', () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) found[frame.id] = measure(frame);
  document.body.innerHTML = '<pre id=found>' + JSON.stringify(found) + '</pre>';
});
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    """Chromium's program, or a skip that says why there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("REQUIRE_CHROMIUM") == "1":
        pytest.fail("REQUIRE_CHROMIUM=1, and no Chromium is installed")
    if found is None:
        pytest.skip("no Chromium is installed (Debian package chromium); REQUIRE_CHROMIUM=1 makes this a failure")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two runs, one of them with a name that is too long."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "block_size_4", course(300)),
        write_run(folder / ("a_name_without_any_place_to_break_it" * 3), course(40), diffusion={"block_size": 8}),
    ]
    (runs[0] / "samples.txt").write_text("word " * 400 + "x" * 300)
    assert main([*map(str, runs), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


def run_browser(browser: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    )
    done = subprocess.run([browser, *fixed, *arguments], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done


def test_the_page_fits_phones_and_desks(browser: str, report: Path, tmp_path: Path) -> None:
    content = html.escape(report.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe id="w{w}" width={w} height=2000 frameborder=0 srcdoc="{content}"></iframe>' for w in WIDTHS
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}{MEASURE}</body>", encoding="utf-8")
    done = run_browser(browser, tmp_path, "--virtual-time-budget=5000", "--dump-dom", f"file://{wrapper}")
    found = json.loads(html.unescape(done.stdout.split('<pre id="found">')[1].split("</pre>")[0]))
    for width in WIDTHS:
        seen = found[f"w{width}"]
        assert seen["overflow"] == 0, f"the page is wider than {width} px"
        assert seen["smallest"] >= SMALLEST_TEXT_PX
        # what does not fit of a table comes into view by scrolling the table, not the page
        assert all(scrolled >= beyond - 1 for beyond, scrolled in seen["scrolled"])
        assert min(seen["widths"]) > 300 and min(seen["heights"]) > 80
    assert found["w400"]["columns"] == 1 and found["w1400"]["columns"] == 3
    assert max(beyond for beyond, _ in found["w400"]["scrolled"]) > 100, "no table of this page tests scrolling"


def pixels(path: Path) -> tuple[int, int, int]:
    """(width, height, number of different bytes) of an 8-bit PNG without interlacing."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    packed, at = b"", 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        packed += content[at + 8 : at + 8 + size] if content[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + size
    return width, height, len(set(zlib.decompress(packed)))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_shows_more_than_white(browser: str, report: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    run_browser(browser, tmp_path, f"--window-size={width},1600", f"--screenshot={picture}", f"file://{report}")
    found_width, height, colours = pixels(picture)
    assert (found_width, height) == (width, 1600) and colours > 50


def test_the_page_prints(browser: str, report: Path, tmp_path: Path) -> None:
    printed = tmp_path / "page.pdf"
    run_browser(browser, tmp_path, f"--print-to-pdf={printed}", "--no-pdf-header-footer", f"file://{report}")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF") and 2 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 20
