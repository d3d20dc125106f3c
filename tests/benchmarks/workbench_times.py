"""How long a person waits for the workbench, in JupyterLab and headless Chromium: from the
double click on its notebook to the first picture, and from Start in an empty folder to the
first ACC and ASR. ``python tests/benchmarks/workbench_times.py``

Wall-clock seconds hold for an idle machine alone; CPU seconds of the kernel, and of the
browser with the server, for any. The notebook is the one of this repository with the first
preset. The run is stopped when the student has been measured for the first time. The
package was imported once before, as every start but the first finds it (compiled).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chromium import CHROMIUM
from lab import ROOT, Bench, lab_server

#: milliseconds; a busy machine is no failure
HOUR = 3_600_000
#: what is waited for -> what the page then says
MILESTONES = {
    "the teacher's first ACC and ASR": "^teacher's ACC[0-9.]+%",
    "the teacher is ready": r"^Training|^ACC[0-9.]+%",
    "the student's first ACC and ASR": "^ACC[0-9.]+%",
}


def processes():
    """Number of a process -> its parent, its command line and its CPU seconds."""
    tick, found = os.sysconf("SC_CLK_TCK"), {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parts = (place / "stat").read_text().rpartition(")")[2].split()
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        spent = sum(map(int, parts[11:15])) / tick  # children that ended included
        found[int(place.name)] = int(parts[1]), line, spent
    return found


def spent():
    """CPU seconds so far: of the kernel, and of everything else that this script started."""
    every, mine = processes(), {os.getpid()}
    while more := {p for p, (parent, *_) in every.items() if parent in mine} - mine:
        mine |= more
    seconds = {"kernel": 0.0, "browser and server": 0.0}
    for number in mine - {os.getpid()}:
        _, line, cpu = every[number]
        seconds["kernel" if "ipykernel_launcher" in line else "browser and server"] += cpu
    return seconds


class Watch:
    """What passed between two marks."""

    def __init__(self):
        self.marks = []

    def mark(self, what):
        """Keep a moment, and the CPU time until then."""
        self.marks.append((what, time.monotonic(), spent()))

    def tell(self, since, what):
        """Mark a moment, and print what passed since an earlier one."""
        self.mark(what)
        began, before = next(mark[1:] for mark in self.marks if mark[0] == since)
        _, wall, cpu = self.marks[-1]
        apart = {f"cpu {name}": round(cpu[name] - before[name], 1) for name in cpu}
        row = {"from": since, "to": what, "wall": round(wall - began, 1), **apart}
        print(json.dumps(row), flush=True)


class Timed(Bench):
    """The workbench, with a mark where its user's waiting begins."""

    watch = Watch()

    def open_notebook(self, file):
        self.watch.mark("page there")
        super().open_notebook(file)
        self.watch.marks.append(("double click", self.began, self.watch.marks[0][2]))
        self.watch.tell("double click", "kernel ready")


def main():
    from playwright.sync_api import sync_playwright

    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", "import abdlab.widgets"], env=env, cwd=ROOT, check=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with (
        tempfile.TemporaryDirectory() as place,
        lab_server(Path(place)) as lab,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        b = Timed(browser, lab, Path(place), "workbench", narrow=True)
        watch = b.watch
        b.picture("clean, triggered and difference").wait_for()
        watch.tell("double click", "first picture")
        b.open("2 Defense")
        watch.mark("Start")
        b.button("Start").click()
        for what, said in MILESTONES.items():
            b.text(said).wait_for(timeout=HOUR)
            watch.tell("Start", what)
        b.button("Stop").click()
        b.text("^Stopped and saved").wait_for()
        b.close()
        browser.close()


if __name__ == "__main__":
    main()
