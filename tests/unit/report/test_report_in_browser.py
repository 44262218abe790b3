"""The report as a browser draws it: no error in the console, nothing wider than the screen."""

import html
import json
import re
import shutil
import subprocess

import pytest

from nemo_paced.evaluation.results import ResultsFile
from nemo_paced.report.comparison import write_comparison
from nemo_paced.report.run_page import write_report
from tests.block_sums import snr_record
from tests.runs import results, write_certificate, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
# An iframe has the width it is given; a headless window is never narrower than about 500 px.
FRAME = """<body style="margin:0">
<iframe src="{name}" style="width:{width}px;height:900px"></iframe>
<script>onmessage = event => document.body.dataset.measured = event.data</script>"""
MEASURE = r"""<script>
document.querySelectorAll("details").forEach(each => each.open = true);
const width = document.documentElement.clientWidth, drawn = [...document.querySelectorAll("svg")];
const box = each => each.getBoundingClientRect();
const named = each => each.tagName + " " + each.textContent.trim().slice(0, 40);
const outside = [...document.querySelectorAll("body *")].filter(each =>
  !each.closest(".scroll, pre, svg") && box(each).right > width + 1).map(named);
const clipped = [...document.querySelectorAll("svg text")].filter(each => {
  const own = box(each), whole = box(each.closest("svg"));
  return own.left < whole.left - 1 || own.right > whole.right + 1 ||
         own.top < whole.top - 1 || own.bottom > whole.bottom + 1; }).map(named);
const overlapping = drawn.flatMap(svg => {
  const level = [...svg.querySelectorAll("text")].filter(each =>
    !/rotate\(-30/.test(each.outerHTML + each.parentElement.outerHTML));
  return level.flatMap((one, index) => level.slice(index + 1).filter(other => {
    const a = box(one), b = box(other);
    return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
           Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  }).map(other => `${one.textContent} / ${other.textContent}`)); });
parent.postMessage(JSON.stringify({
  width, scrolled: document.documentElement.scrollWidth, drawn: drawn.length, outside, clipped,
  overlapping, small: drawn.filter(each => box(each).height < 80).length }), "*");
</script>"""


def measure(page, width, profile):
    """(console output, MEASURE's findings) of the page drawn ``width`` pixels wide."""
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(name=copy.name, width=width))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=5000",
            "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert found, "the page did not run to its end"
    return console, json.loads(html.unescape(found[1]))


LONG = ("unweighted", "qwen3_1.7b_from_8b_hard_filter_seed3", "qwen3_1.7b_from_8b_paced_seed3")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of a run with everything that a report can show, and of runs with long names."""
    folder = tmp_path_factory.mktemp("pages")
    run = write_run(folder / "run", steps=300)
    ResultsFile(results(hard_filter=0.0, paced=0.1), {"temperature": 0.6}).write(
        run / "results.json"
    )
    write_certificate(run)
    snr_record(lambda p: 0.3, lambda p: 10 * (1.05 - p)).write(run / "snr" / "step_00000003.json")
    runs = {name: write_run(folder / name, steps=20 * n) for n, name in enumerate(LONG, 1)}
    compared = folder / "comparison.html"
    measured = results(**dict.fromkeys(LONG, 0.1))
    write_comparison(compared, "Arms", runs, measured, subject=LONG[-1], settings={})
    return {"run": write_report(run), "comparison": compared}


@pytest.mark.parametrize("width", [380, 1200])
@pytest.mark.parametrize("page", ["run", "comparison"])
def test_the_report_fits_the_screen_without_console_errors(pages, tmp_path, page, width):
    console, found = measure(pages[page], width, tmp_path)
    assert not console
    assert found["outside"] == [] and found["scrolled"] <= found["width"]
    assert abs(found["width"] - width) <= 20, "less a scroll bar"
    assert found["drawn"] >= 15 and found["small"] == 0
    assert found["clipped"] == [] and found["overlapping"] == [], "texts of figures"
