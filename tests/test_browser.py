"""The workbench as a user has it: JupyterLab in headless Chromium, clicked through from
the trigger to a repeated run.
"""

import importlib.util
import json
import re
import time

import pandas as pd
import pytest
import torch
import yaml
from chromium import CHROMIUM, SHOTS
from lab import LAYOUT_SECONDS, Bench
from PIL import Image

from abdlab import batch, build
from abdlab.checkpoint import read_card

TINY = {
    "teacher.epochs": 4,
    "teacher.model": "wrn-10-1",
    "teacher.width": 4,
    "student.width": 4,
    "zskt.pseudo_batches": 240,  # enough to press Pause before they are done
    "zskt.student_steps": 2,
    "zskt.width": 4,
    "zskt.batch_size": 16,
    "clean.epochs": 1,
    "sv.verify": False,
    "sv.alpha": 0.55,
    "sv.layers": 3,
    "tu.inner_steps": 2,
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="needs playwright (pip install '.[test]')",
    ),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, and there is none on the PATH"),
]


@pytest.fixture
def bench(browser, lab, folder, request):
    opened = []

    def make(name, **more):
        opened.append(Bench(browser, lab, folder, name, **TINY | more))
        return opened[-1]

    yield make
    for each in opened:
        if not each.page.is_closed():
            SHOTS.mkdir(exist_ok=True)
            each.page.screenshot(path=SHOTS / f"last-{request.node.name}.png")
            each.page.close()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_from_the_trigger_to_a_run_that_is_repeated(bench, tmp_path):
    from playwright.sync_api import expect

    b = bench("walk")
    b.open("4 Runs")
    b.text("No runs yet: run 01_poisoning, or press Start").wait_for()
    b.open("3 Samples")
    b.text("No samples yet").wait_for()

    b.open("1 Teacher")
    picture = b.picture("clean, triggered and difference")
    picture.wait_for()
    before = picture.get_attribute("src")
    handle = b.slider("size (pixels)")
    handle.focus()
    b.page.keyboard.press("ArrowRight")
    b.page.wait_for_function("([e, old]) => e.src !== old", arg=[picture.element_handle(), before])
    b.page.keyboard.press("ArrowLeft")
    b.shot("light-1-trigger")

    b.open("2 Defense")
    b.text("No run yet: press Start").wait_for()
    b.shot("light-2-empty")
    b.begin()
    b.text("^ASR[0-9.]+%").wait_for()
    b.slider("SV: alpha").focus()
    b.page.keyboard.press("ArrowRight")
    b.page.locator("li", has_text=re.compile("sv: alpha .* from pseudo-batch")).wait_for()
    b.button("Pause").click()
    b.text("^Paused").wait_for()
    b.shot("light-2-paused")
    b.button("Go on").click()
    b.button("Stop").click()
    b.text("^Stopped and saved").wait_for()
    first = b.runs / "seed0" / "zskt+sv+tu@1"
    stopped = read_card(first / "checkpoint.safetensors")["index"]
    assert 0 < stopped < TINY["zskt.pseudo_batches"]
    assert metrics(first)["stopped_at"] == stopped

    b.button("Branch here").click()
    b.text(f"branches off zskt.sv.tu@1 at step {stopped}").wait_for()
    typed = b.field("SV: alpha, typed")
    typed.fill("much")
    typed.press("Enter")
    b.page.locator(".abdlab-dialwrong", has_text='"much" is no number; it stays').wait_for()
    typed.fill(".003")
    b.button("Start").click()  # what was typed may come after it
    b.text("^Done: zskt.sv.tu@2").wait_for()
    b.page.locator("select[multiple]").select_option(["zskt+sv+tu@1", "zskt+sv+tu@2"])
    b.picture("ACC and ASR of the chosen runs").wait_for()
    b.button("Copy as parameters").click()
    b.page.get_by_role(
        "button", name="Copy to the clipboard"
    ).wait_for()  # it shows once there is something to copy
    text = b.page.locator(".abdlab-copy pre").locator("visible=true").first.inner_text()
    b.shot("light-2-done")

    b.open("3 Samples")
    b.button("Suspicious tail").click()  # at once: what the tab begins is ended first
    b.text("of [0-9]+ images selected").wait_for()
    detail = b.page.locator(".abdlab-picture img[alt^='image ']").locator("visible=true").first
    before, gallery = detail.get_attribute("alt"), b.picture("images learnt from; click one")
    gallery.click(position={"x": 300, "y": 25})
    try:
        expect(detail).not_to_have_attribute("alt", before, timeout=20_000)
    except AssertionError:  # it was the one that is enlarged
        gallery.click(position={"x": 100, "y": 25})
        expect(detail).not_to_have_attribute("alt", before, timeout=60_000)
    b.button("Draw the map").click()
    b.page.locator("progress:visible").wait_for()
    plan = b.picture("t-SNE map")
    plan.wait_for()
    plan.scroll_into_view_if_needed()
    box = plan.bounding_box()
    b.page.mouse.move(box["x"] + 60, box["y"] + 20)
    b.page.mouse.down()
    b.page.mouse.move(box["x"] + 260, box["y"] + 200, steps=4)
    b.page.mouse.up()
    b.shot("light-3-samples")
    b.button("Export the selection").click()
    b.text("images exported to").wait_for()

    b.button("Export the selection").focus()  # from here on, the keyboard alone
    b.go_to("2 Defense")
    b.tab_to(b.slider("SV: alpha"))
    b.page.keyboard.press("ArrowRight")
    b.tab_to(b.button("Start"), "Shift+Tab")
    b.page.keyboard.press("Space")
    b.text("^Training zskt.sv.tu@3").wait_for()
    b.tab_to(b.button("Stop"))
    b.page.keyboard.press("Enter")
    b.text("^(Stopped and saved|Done: zskt.sv.tu@3)").wait_for()
    b.go_to("4 Runs")
    heading = b.page.locator(".abdlab-rows:visible th button").first
    b.tab_to(heading)
    for sign in "▲▼▲":  # sorted by the keyboard, which keeps its place
        b.page.keyboard.press("Enter")
        expect(heading).to_contain_text(sign)
        expect(heading).to_be_focused()
    b.tab_to(b.page.locator(".abdlab-rows:visible tbody tr").first)
    row = b.page.locator(".abdlab-rows tr[data-id='seed0/zskt+sv+tu@3']")
    for _ in range(9):
        if row.evaluate("e => e === document.activeElement"):
            break
        b.page.keyboard.press("ArrowDown")
    b.page.keyboard.press("Space")
    b.page.locator(".abdlab-card", has_text=re.compile(r"^\s*seed0/zskt.sv.tu@3")).first.wait_for()
    b.page.locator(".abdlab-rows tr[data-id='seed0/zskt+sv+tu@1']").click()
    row = b.page.locator(".abdlab-rows tr[data-id='seed0/zskt+sv+tu@2']")
    row.focus()
    b.page.keyboard.press("Enter")
    b.text("Settings that differ").wait_for()
    known = {}
    for name in ("zskt+sv+tu@3", "zskt+sv+tu@1", "zskt+sv+tu@2", "clean", "teacher"):
        lines = (b.runs / "seed0" / name / "history.jsonl").read_text().splitlines()
        known[f"seed0/{name}"] = [json.loads(line) for line in lines]
    for name in ("clean", "teacher"):
        b.page.locator(f".abdlab-rows tr[data-id='seed0/{name}'] td").first.click()
    # the page holds what it tells back while the kernel draws; a button's click it does not
    b.page.locator(".abdlab-card", has_text=re.compile(r"^\s*seed0/teacher")).first.wait_for()
    line = b.page.locator(".js-plotly-plot .trace", has=b.page.locator(".points path")).first
    b.page.wait_for_function("document.querySelectorAll('.js-plotly-plot .trace').length > 9")
    from playwright.sync_api import Error as PlaywrightError

    told, read = b.page.locator(".hoverlayer .hovertext").first, None
    until, at = time.monotonic() + 90, 0
    while read is None and time.monotonic() < until:
        try:  # the figure may be drawn anew meanwhile; a point may lie below a mark
            points = line.locator(".points path")
            point, at = points.nth(at % max(1, points.count())), at + 1
            point.scroll_into_view_if_needed(timeout=3e3)
            box = point.bounding_box(timeout=3e3)
            if box is None:
                continue
            b.page.mouse.move(box["x"] - 40, box["y"] + 20)
            b.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
            told.wait_for(timeout=3e3)
            said = told.text_content(timeout=3e3)
        except PlaywrightError:
            continue
        read = re.search(r"step ([0-9]+): (ACC|ASR) ([0-9.]+ %)", said)
    assert read, "no point of a curve told its value"
    step, score, value = read.groups()
    assert (int(step), value) in {
        (row["step"], f"{100 * row[score.lower()]:.2f} %")
        for rows in known.values()
        for row in rows
        if score.lower() in row
    }
    b.shot("light-4-runs")
    b.button("Save as CSV").click()
    b.text("5 histories saved to").wait_for()
    table = pd.read_csv(b.runs / "exports/runs-1.csv").astype(object)
    for name, rows in known.items():
        part = table[table["run"] == name].drop(columns="run").to_dict("records")
        part = [{k: v for k, v in row.items() if v == v} for row in part]
        assert [
            row | {"events": json.loads(row["events"])} if "events" in row else row for row in part
        ] == rows

    b.menu("Settings", "Theme", "JupyterLab Dark")
    b.page.wait_for_timeout(5000)
    for name in ("1 Teacher", "2 Defense", "3 Samples", "4 Runs"):
        b.open(name)
        b.shot(f"dark-{name[0]}")
        assert b.nameless() == [], name
    b.close()

    found = tmp_path / "parameters.yaml"
    found.write_text(text)
    given = yaml.safe_load(found.read_text())
    alphas = [v for _, v in given["overrides"]["sv.alpha"]]
    assert alphas[0] == 0.55 < alphas[1]  # a step of a slider that goes by decades
    assert alphas[-1] == 0.003  # as it was typed
    given["run"] = str(tmp_path / "again")
    batch.execute("02_distillation", tmp_path / "02.ipynb", given, threads=1)
    branch, again = (
        metrics(f / "seed0" / n)
        for f, n in ((b.runs, "zskt+sv+tu@2"), (tmp_path / "again", "zskt+sv+tu"))
    )
    assert (again["acc"], again["asr"]) == (branch["acc"], branch["asr"])


def test_a_run_that_loses_its_kernel_or_page_saves_itself(bench):
    """Interrupted, its cells run again, its page closed; between them it goes on."""
    # a page that is closed is believed gone after seconds, not minutes, and the run is
    # long enough for that
    before = "from abdlab.widgets import worker\nworker.PATIENCE = 12\n"
    b = bench("lost", before=before, narrow=True, **{"zskt.pseudo_batches": 4000})
    found = b.runs / "seed0" / "zskt+sv+tu@1"

    def saved(after):
        """The step at which it was stopped, later than another, once it is written."""
        until = time.monotonic() + 120
        while not (found / "metrics.json").exists() or metrics(found).get("stopped_at", 0) <= after:
            assert time.monotonic() < until, "it was not saved"
            time.sleep(0.5)
        time.sleep(2)  # and stays stopped
        assert metrics(found)["stopped_at"] == read_card(found / "checkpoint.safetensors")["index"]
        return metrics(found)["stopped_at"]

    def go_on():
        b.button("Go on").click()
        b.text("^Training zskt.sv.tu@1").wait_for()

    b.open("2 Defense")
    b.begin()
    # a small page with Lab's file browser open: all that matters is in sight
    curves = b.picture("ACC, ASR and losses")
    curves.wait_for()
    b.page.wait_for_timeout(1000 * LAYOUT_SECONDS)
    b.view("narrow-2-running")
    assert b.in_sight(curves)
    assert b.in_sight(b.text("^ACC[0-9.]+%"))
    b.menu("Kernel", "Interrupt Kernel")
    b.text("The kernel was interrupted").wait_for()
    interrupted = saved(0)

    go_on()
    b.menu("Run", "Run All Cells")
    b.page.wait_for_timeout(2000)
    b.open("2 Defense")
    b.text(r"zskt.sv.tu@1 at step \d+ of 4000: Go on continues it").wait_for()
    curves.wait_for()  # those of the run that was stopped
    assert b.button("Copy as parameters").is_enabled()
    again = saved(interrupted)

    go_on()
    b.page.close()
    assert saved(again) < 4000


def test_a_strangers_file_to_a_defended_student(bench, folder):
    torch.manual_seed(0)
    net = build("wrn-10-1", classes=3, channels=1)
    torch.save({"net": net.state_dict(), "epoch": 3}, folder / "theirs.pt")
    b = bench("own", narrow=True, **{"zskt.pseudo_batches": 60})
    b.page.get_by_role("button", name="open a file of weights").click()
    b.field("file").fill(str(folder / "theirs.pt"))
    b.button("Load and check").click()
    b.text("weights do not say how large images are").wait_for()
    mine = folder / "mine"  # a few images of one's own, unlabelled: they tell the shape
    mine.mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(mine / f"{i}.png")
    for field, text in (("architecture", "wrn-10-1"), ("images", str(mine))):
        b.field(field).fill(text)
        b.field(field).press("Tab")
    b.button("Load and check").click()
    b.text("^Loaded: .*3 classes; teacher theirs.pt, trigger unknown").wait_for()
    b.button("Audit").click()
    b.picture("inverted triggers on synthetic images").wait_for()
    b.text("^(Class . is suspicious|Nothing found)").wait_for()
    b.picture("what the cheapest trigger of every class costs").wait_for()
    b.shot("narrow-1-audited")
    b.button("Use this teacher").click()
    b.text("^Teacher theirs.pt, trigger unknown, target unknown, data .*mine").wait_for()
    b.button("Start").click()
    b.text("^ACCunknown").wait_for()
    curves = b.picture("ACC, ASR and losses")
    curves.wait_for()
    assert b.in_sight(curves)
    b.text("^Done: zskt.sv.tu@1").wait_for()
    b.shot("narrow-2-own")
    b.open("3 Samples")
    b.text("Teacher theirs.pt, trigger unknown").wait_for()
    b.picture("images learnt from; click one").wait_for()
    b.open("4 Runs")
    row = b.page.locator(".abdlab-rows tr[data-id='seed0/zskt+sv+tu@1'] td")
    row.first.wait_for()
    assert row.all_inner_texts().count("unknown") == 3, "ACC, ASR and the trigger"
    row.first.click()
    b.close()
    assert metrics(b.runs / "seed0/zskt+sv+tu@1")["acc"] is None
