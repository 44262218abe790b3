"""The report as a browser draws it: no error in the console, nothing wider than the screen."""

import re
import shutil
import subprocess

import pytest

from nemo_paced.analysis.comparison import write_comparison
from nemo_paced.analysis.report import write_report
from nemo_paced.evaluation.results import ResultsFile
from tests.runs import results, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
# An iframe has the width it is given; a headless window is never narrower than about 500 px.
FRAME = """<body style="margin:0">
<iframe src="{name}" style="width:{width}px;height:900px"></iframe>
<script>onmessage = event => document.body.dataset.measured = event.data</script>"""
MEASURE = """<script>
document.querySelectorAll("details").forEach(each => each.open = true);
const width = document.documentElement.clientWidth, drawn = document.querySelectorAll("svg");
const small = [...drawn].filter(each => each.getBoundingClientRect().height < 80).length;
const outside = [...document.querySelectorAll("body *")].filter(each =>
  !each.closest(".scroll, pre, svg") && each.getBoundingClientRect().right > width + 1).length;
const clipped = [...document.querySelectorAll("svg text")].filter(each => {
  const box = each.getBoundingClientRect(), own = each.closest("svg").getBoundingClientRect();
  return box.left < own.left - 1 || box.right > own.right + 1 ||
         box.top < own.top - 1 || box.bottom > own.bottom + 1; }).map(each => each.textContent);
parent.postMessage(`${width} ${document.documentElement.scrollWidth} ${outside} ${small} ` +
                   `${drawn.length} [${clipped}]`, "*");
</script>"""


def measure(page, width, profile):
    """(console output, what MEASURE found) of the page drawn ``width`` pixels wide."""
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
    return console, found[1].split(" ", 5)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = {name: write_run(folder / name) for name in ("hard_filter", "paced")}
    measured = results(hard_filter=0.0, paced=0.1)
    ResultsFile(measured, {"temperature": 0.6}).write(runs["paced"] / "results.json")
    both = folder / "report.html"
    write_comparison(both, "Arms", runs, measured, subject="paced", settings={})
    return {"run": write_report(runs["paced"]), "comparison": both}


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("page", ["run", "comparison"])
def test_the_report_fits_the_screen_without_console_errors(pages, tmp_path, page, width):
    console, (inner, scroll, outside, small, drawn, clipped) = measure(pages[page], width, tmp_path)
    assert not console
    assert abs(int(inner) - width) <= 20 and int(scroll) <= int(inner) and outside == "0"
    assert int(drawn) >= 10 and small == "0" and clipped == "[]"
