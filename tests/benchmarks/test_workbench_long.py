"""What takes minutes and is therefore no part of ``make test``: the clean-label triggers
handed on and taught in the page, and a queue seen to its end inside a kernel.
"""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parents[1]))

from chromium import CHROMIUM
from lab import Bench, lab_server

pytestmark = pytest.mark.benchmark

HOUR = 3_600_000
QUEUE = """
import abdlab
from abdlab.widgets import Queue
tiny = {"teacher.epochs": 1, "teacher.model": "wrn-10-1", "teacher.width": 4,
        "student.width": 4, "zskt.pseudo_batches": 4, "zskt.student_steps": 1,
        "zskt.width": 4, "zskt.batch_size": 8, "sv.verify": False, "sv.layers": 3}
chosen = abdlab.settings("quick/digits", tiny, device="cpu")
queue = Queue("ROOT", lambda: chosen, "zskt+sv")
queue.setting.value, queue.values.value = "sv.alpha", "0.01, 0.1, 0.5"
queue.seeds.value = "0, 1, 2"
queue.start()
queue.wait()
print(queue.state, queue.trouble.sentence, queue.status.value)
for row in queue.rows.rows:
    print(*row["cells"], sep=";")
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, and there is none on the PATH")
def test_clean_label_triggers_are_taught_as_they_are_handed_on(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with lab_server(tmp_path) as lab, playwright.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        b = Bench(browser, lab, tmp_path, "handed", narrow=True)
        for name in ("sig", "cl"):
            b.open("1 Teacher")
            b.field("trigger").select_option(name)
            b.button("Use in a training run").click()
            b.text(f"The next run's teacher: {name}").wait_for(timeout=HOUR)
            b.button("Start").click()
            b.text("^First clean KD|^Training|next to no backdoor").wait_for(timeout=HOUR)
            b.button("Stop").click()
            b.text("^Stopped").wait_for(timeout=HOUR)
            files = (tmp_path / "handed").rglob("seed0/teacher/metrics.json")
            asr = {
                json.loads((p.parent / "config.json").read_text())["attack"]["trigger"]: p
                for p in files
            }
            taught = json.loads(asr[name].read_text())
            print(f"{name}: ACC {taught['acc']:.1%}, ASR {taught['asr']:.1%}")
            assert taught["asr"] >= 0.9
        b.close()
        browser.close()


def test_a_queue_to_its_end_inside_a_kernel(tmp_path):
    cell = nbformat.v4.new_code_cell(QUEUE.replace("ROOT", str(tmp_path / "runs")))
    book = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(book, timeout=3600, kernel_name="python3").execute()
    state, *rows = "".join(out.get("text", "") for out in book.cells[0].outputs).splitlines()
    print(state, *rows, sep="\n")
    assert state.startswith("done")
    students = [row.split(";") for row in rows if row.startswith("alpha=")]
    assert len(students) == 9
    assert all(cells[1] == "done" and float(cells[3]) >= 0 for cells in students)
