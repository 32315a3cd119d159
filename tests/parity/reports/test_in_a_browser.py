"""The report in Chromium: as wide as the screen, readable, light and dark, no console errors."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from dataclasses import replace
from urllib.error import URLError

import pytest

from propulsion_export.parity.comparison import DECADES, OutputErrors
from propulsion_export.parity.reports.html import to_html
from propulsion_export.parity.reports.report import (
    Check,
    Coverage,
    NotRun,
    ParityReport,
    Price,
    Rounding,
)

pytestmark = pytest.mark.browser
COUNTS = tuple(2 * (decade in range(-8, -5)) for decade in DECADES[:-1])
GOOD = OutputErrors("logits", 3e-6, 4e-7, 2e-6, 8e-6, 5.0, "[0, 1]: oracle 1", 6, 0, COUNTS, COUNTS)
LONG = "tenant-with-a-very-long-name_" * 6
REPORT = ParityReport(
    artifact=f"/srv/{LONG}/switchable",
    kind="onnx",
    dtype="float16",
    runner="a runner",
    inputs=16,
    seed=7,
    checks=(
        Check("parity", "base", True, "found", (GOOD,)),
        Check("parity", LONG, False, f"{LONG} is off", (replace(GOOD, error=4e-3),)),
    ),
    not_run=(NotRun(LONG, f"no GPU for {LONG}"),),
    tools={LONG: "1.0", "torch": LONG},
    coverage=(Coverage(LONG, True, LONG), Coverage("masks", False, LONG)),
    rounding=(Rounding(LONG, "logits", 0.5, None, 2.0),),
    price=(Price(LONG, LONG, 16, kl=0.25),),
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# An element reaches past the screen, and none of its ancestors scrolls.
BEYOND = """
const hidden = (e) => e.closest('.wide, thead') !== null;
return [...document.querySelectorAll('body *')].filter(
  (e) => !hidden(e) && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML);
"""
SMALL = """
return [...document.querySelectorAll('main *')].filter((e) => [...e.childNodes].some(
    (n) => n.nodeType === 3 && n.data.trim())).map((e) => {
  const scale = e.getScreenCTM && e.tagName === 'text' ? Math.abs(e.getScreenCTM().a) || 1 : 1;
  return parseFloat(getComputedStyle(e).fontSize) * scale; }).reduce((a, b) => Math.min(a, b));
"""
CONTRAST = """
const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map((v) => v / 255).map(
    (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => { const c = getComputedStyle(e).backgroundColor;
  return c === 'rgba(0, 0, 0, 0)' && e.parentElement ? behind(e.parentElement) : c; };
const has = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
return Math.min(...[...document.querySelectorAll('main :not(svg *)')].filter(has).map(
  (e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
"""


class Browser:
    """A session of ChromeDriver, spoken to in the WebDriver protocol."""

    def __init__(self, port, chromium, profile):
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("", capabilities={"alwaysMatch": asked})
        self.address += f"/{session['sessionId']}"

    def post(self, command, **values):
        request = urllib.request.Request(
            self.address + command,
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def devtools(self, command, **values):
        return self.post("/goog/cdp/execute", cmd=command, params=values)

    def run(self, script):
        return self.post("/execute/sync", script=script, args=[])

    def show(self, page, width, scheme="light", medium="screen"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", media=medium, features=[feature])
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **screen)
        self.post("/url", url=page.as_uri())

    def close(self):
        request = urllib.request.Request(self.address, method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([programs[1], f"--port={port}"], **quiet) as driver:
        try:
            wait_for(port)
            browser = Browser(port, programs[0], tmp_path_factory.mktemp("profile"))
            yield browser
            browser.close()
        finally:
            driver.terminate()


def wait_for(port):
    for _ in range(150):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
        except URLError:
            time.sleep(0.2)
        else:
            return
    raise TimeoutError("ChromeDriver did not answer in 30 s")


@pytest.fixture
def page(tmp_path):
    (tmp_path / "parity.html").write_text(to_html(REPORT), encoding="utf-8")
    return tmp_path / "parity.html"


@pytest.mark.parametrize("medium", ["screen", "print"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_as_wide_as_the_screen(width, medium, browser, page):
    browser.show(page, width, medium=medium)

    assert browser.run(BEYOND) == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(scheme, browser, page):
    browser.show(page, 360, scheme)

    assert browser.run(SMALL) >= 9
    assert browser.run(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3


def test_light_and_dark_differ(browser, page):
    colours = set()
    for scheme in ("light", "dark"):
        browser.show(page, 360, scheme)
        colours.add(browser.run("return getComputedStyle(document.body).backgroundColor"))

    assert len(colours) == 2


def test_the_console_stays_empty(browser, page):
    browser.post("/se/log", type="browser")
    browser.show(page, 1280)

    assert browser.post("/se/log", type="browser") == []


def test_mistakes_of_a_page_are_found(browser, page):
    wide = page.read_text().replace("</main>", '<p style="width:50rem;color:#888">x</p></main>')
    page.write_text(wide.replace("</main>", '<img src="lost.png"></main>'))
    browser.post("/se/log", type="browser")
    browser.show(page, 360)

    assert len(browser.run(BEYOND)) == 1
    assert browser.run(CONTRAST) < 4.5
    assert browser.post("/se/log", type="browser")
