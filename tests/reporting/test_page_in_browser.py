"""The page in a real browser, without a network: it is drawn, its script runs, and it fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.reporting.sample_run import write_run
from trl_moe_ext.reporting.page import read_run, render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

# A frame of any width around the page, which asks it what a reader would see. A window cannot be as narrow as a phone.
AROUND = """<!doctype html><body style="margin:0">
<iframe src="report.html" style="border:0;width:{width}px;height:9000px"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument;
  const answers = (() => {{ {questions} }})();
  document.querySelector("pre").textContent = JSON.stringify(answers);
}};
</script>"""
OVERFLOW = """
const wide = [...page.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") && !e.closest("svg") &&
  e.getBoundingClientRect().right > page.documentElement.clientWidth + 0.5);
return {page: page.documentElement.scrollWidth, width: page.documentElement.clientWidth,
  wide: wide.map((e) => e.outerHTML.slice(0, 80))};
"""
SECTIONS = """
return {sections: [...page.querySelectorAll("section")].map((e) => e.id),
  headings: [...page.querySelectorAll("h2")].map((e) => e.getBoundingClientRect().height > 0),
  lines: [...page.querySelectorAll("svg path.line")].map((e) => e.getBoundingClientRect().width > 100),
  pictures: [...page.querySelectorAll(".heatmap img")].map((e) => [e.complete, e.naturalWidth, e.naturalHeight])};
"""
POINTER = """
const move = (area, x, y) => {
  const box = area.getBoundingClientRect();
  const at = {clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true};
  area.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
};
const text = (selector) => page.querySelector(selector).textContent;
const loss = page.querySelector("#loss .area"), load = page.querySelector(".heatmap .area");
const before = text("#loss .legend .main output");
move(loss, 0.5, 0.5);
const during = [text("#loss .at"), text("#loss .legend .main output"), text("#loss .legend .second output")];
loss.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
const slider = page.querySelector(".time input"), last = page.querySelector(".heatmap .area img").src;
const seen = [text(".readout")];
move(load, 0.99, 0.5);
seen.push(text(".readout"));
slider.value = 0;
slider.dispatchEvent(new frame.contentWindow.Event("input"));
seen.push(text(".readout"));
page.querySelectorAll(".strip figure")[1].click();
seen.push(text(".readout"));
return {before, during, after: text("#loss .legend .main output"), seen, slider: slider.value,
  hidden: page.querySelector(".time").hidden, changed: page.querySelector(".heatmap .area img").src !== last};
"""


def chromium(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A browser that can reach nothing but files."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=5000"),
        *(f"--user-data-dir={directory / 'profile'}", *options),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page wrote on its console, its errors among it."""
    return re.findall(r".*CONSOLE.*", done.stderr)


def ask(directory: Path, width: int, questions: str, *options: str) -> dict[str, object]:
    """The answers of the page in a frame of `width` pixels."""
    file = directory / "around.html"
    file.write_text(AROUND.format(width=width, questions=questions))
    done = chromium(directory, "--dump-dom", *options, file.as_uri())
    assert console(done) == []
    return json.loads(re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)[1].replace("&amp;", "&"))


@pytest.fixture
def page(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Directory of a run and its page."""
    directory = write_run(tmp_path / "run", **getattr(request, "param", {}))
    (directory / "report.html").write_text(render_page(read_run(directory)))
    return directory


def test_every_section_is_drawn(page: Path) -> None:
    found = ask(page, 1200, SECTIONS)
    assert found["sections"] == ["loss", "router", "drift", "adapted", "cost", "settings"]
    assert all(found["headings"])
    assert len(found["lines"]) > 10
    assert all(found["lines"])
    assert found["pictures"] == [[True, 4, 3]] * 7


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
@pytest.mark.parametrize("page", [{}, {"layers": 40}, {"router": "off"}], indirect=True, ids=["full", "deep", "plain"])
def test_nothing_is_wider_than_the_page(page: Path, width: int) -> None:
    found = ask(page, width, OVERFLOW)
    assert found["width"] == width
    assert found["page"] == width
    assert found["wide"] == []


def test_the_question_of_the_width_can_fail(page: Path) -> None:
    html = (page / "report.html").read_text()
    (page / "report.html").write_text(html.replace("</main>", "<div style='width:2000px'>wide</div></main>"))
    found = ask(page, 390, OVERFLOW)
    assert found["page"] >= 2000
    assert found["wide"]


def test_the_pointer_and_the_slider_tell_values(page: Path) -> None:
    found = ask(page, 1200, POINTER)
    assert (found["before"], found["after"]) == ("0.271", "0.271")
    assert found["during"] == ["step 50", "0.736", "0.900"]
    assert found["seen"][0] == "step 100"
    assert found["seen"][1] == "layer 1, expert 3: 0.00\N{MULTIPLICATION SIGN} at step 100"
    assert found["seen"][2] == "layer 1, expert 3: 0.91\N{MULTIPLICATION SIGN} at step 10"
    assert re.fullmatch(r"layer 1, expert 3: .* at step 30", found["seen"][3])
    assert (found["hidden"], found["changed"], found["slider"]) == (False, True, "2")


def test_an_error_on_the_console_is_seen(page: Path) -> None:
    html = (page / "report.html").read_text()
    (page / "report.html").write_text(html.replace("</body>", "<script>missing()</script></body>"))
    with pytest.raises(AssertionError, match="missing is not defined"):
        ask(page, 1200, SECTIONS)


@pytest.mark.parametrize(("scheme", "background"), [(1, (250, 249, 246)), (0, (24, 23, 21))], ids=["light", "dark"])
def test_light_and_dark(page: Path, scheme: int, background: tuple[int, int, int]) -> None:
    picture, file = page / "page.png", page / "report.html"
    chromium(
        page,
        *(f"--screenshot={picture}", "--window-size=1200,900", "--hide-scrollbars", "--force-color-profile=srgb"),
        *(f"--blink-settings=preferredColorScheme={scheme}", file.as_uri()),
    )
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=10**6)
    assert max(colours)[1] == background
    assert len(colours) > 50, "an empty page"
