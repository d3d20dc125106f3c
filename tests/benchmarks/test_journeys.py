"""Journeys through the workbench that are no part of ``make test``: the folder of a whole
demo, and a kernel that is restarted in the middle of a run. ``make journeys`` runs them, the
other browser journeys and the long ones, three times in a row.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from chromium import CHROMIUM
from lab import Bench
from test_browser import TINY, metrics

from abdlab import batch

#: the notebooks of the demo
DEMO = [name for name in batch.notebooks() if name[:2] in ("01", "02", "03", "04", "05")]
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, and there is none on the PATH"),
]


@pytest.fixture(scope="module")
def demo(folder):
    """What the demo's notebooks leave behind: a copy of ABDLAB_DEMO, where that is set, else
    made here with few steps.
    """
    root = folder / "demo"
    if made := os.environ.get("ABDLAB_DEMO"):
        shutil.copytree(made, root)
        return root
    for name in DEMO:
        given = {"run": str(root), "device": "cpu", "overrides": TINY}
        batch.execute(name, root / f"{name}.ipynb", given, threads=1)
    return root


def test_the_folder_of_a_whole_demo(browser, lab, folder, demo):
    b = Bench(browser, lab, folder, "demo", narrow=True)
    wrong = b.page.locator(".abdlab-wrong:visible")
    b.picture("clean, triggered and difference").wait_for()
    b.open("3 Samples")
    b.picture("images learnt from; click one").wait_for()
    b.open("4 Runs")
    rows = b.page.locator(".abdlab-rows:visible tbody tr")
    rows.first.wait_for()
    names = [row.get_attribute("data-id") for row in rows.all()]
    kept = {str(path.parent.relative_to(demo)) for path in demo.rglob("metrics.json")}
    assert {*names} >= {name for name in kept if name.startswith("seed0/")}
    assert any(name.startswith("04_") for name in names), "a notebook's own numbers"
    for name in names:  # each is looked at, notebooks' folders too
        b.page.locator(f".abdlab-rows tr[data-id='{name}'] td").first.click()
        words = re.compile(r"^\s*" + re.escape(name))
        b.page.locator(".abdlab-card", has_text=words).first.wait_for()
        assert wrong.count() == 0, (name, wrong.all_inner_texts())
    b.page.locator(".js-plotly-plot:visible .trace").first.wait_for()
    b.view("demo-4-runs")
    b.close()


def test_a_kernel_that_is_restarted_in_the_middle_goes_on_in_the_page(browser, lab, folder):
    b = Bench(browser, lab, folder, "restarted", narrow=True, **TINY | {"zskt.pseudo_batches": 900})
    b.open("2 Defense")
    b.begin()
    b.menu("Kernel", "Restart Kernel…")
    b.page.locator(".jp-Dialog button", has_text=re.compile("^Restart$")).click()
    b.page.locator(".jp-Dialog").wait_for(state="detached")
    b.menu("Run", "Run All Cells")
    b.page.wait_for_timeout(2000)
    b.open("2 Defense")
    b.text(r"zskt.sv.tu@1 at step \d+ of 900: Go on continues it").wait_for()
    curves = b.picture("ACC, ASR and losses")
    curves.wait_for()
    b.button("Go on").click()
    b.text("^Done: zskt.sv.tu@1").wait_for()
    assert b.in_sight(curves)
    b.close()
    done = metrics(b.runs / "seed0" / "zskt+sv+tu@1")
    assert done["acc"] >= 0
    assert "stopped_at" not in done
