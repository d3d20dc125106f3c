"""Many jobs over many Ray nodes on one machine, of which nodes and workers are killed at
random: none may be lost.

    python tests/benchmarks/ray_kills.py [--jobs 500] [--nodes 8] [--kills 24] [--seed 0]

Real are the study, its folder, the sweep's loop, Ray, its nodes, and what a job does to its
folder (lock, status, tries). Simulated is the notebook: in place of a kernel, which takes a
second, a job waits for a moment and writes its metrics. So that a killed node comes back, a
new one is started in its place.
"""

import argparse
import json
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from ray_nodes import start_node, stop_node

from abdlab import studies
from abdlab.studies import engines, job

SMALL = "--object-store-memory=80000000"
NOTEBOOK = 'run = "runs"  # folder\nx = 0  # a number\nseed = 0  # of everything'


def simulated(spec):
    """What a Ray worker does, with a moment's wait in place of the notebook."""

    def wait(book, output, given, *_):
        folder = Path(given["run"]) / "seed0" / "zskt"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "starts.txt").open("a") as file:
            file.write("start\n")
        time.sleep(0.3 + 0.7 * random.Random(given["x"]).random())
        values = {"label": "zskt", "seed": 0, "acc": given["x"] / 1000, "asr": 0.0}
        (folder / "metrics.json").write_text(json.dumps(values))

    job.run_kernel = wait
    return engines._ray_job(spec)


def study_in(folder, jobs):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / "simulated.ipynb")
    return studies.make_study(folder / "simulated.ipynb", grid={"x": list(range(jobs))}, retries=5)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(process):
    """A process's command line; empty when it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Killer(threading.Thread):
    """Kills at random moments, a node or one worker's process, and replaces nodes."""

    def __init__(self, nodes, address, kills, rng, done):
        super().__init__(daemon=True)
        self.nodes, self.address, self.kills, self.rng = nodes, address, kills, rng
        self.done, self.ended = done, threading.Event()
        self.told = {"node": 0, "worker": 0}
        self.error = ""

    def run(self):
        try:
            self.kill_all()
        except Exception as error:  # a thread's error ends nothing by itself
            self.error = repr(error)
            raise

    def kill_all(self):
        # spread over the run by what is done, not by the clock
        for share in sorted(self.rng.uniform(0.02, 0.95) for _ in range(self.kills)):
            while self.done() < share:
                if self.ended.wait(0.1):
                    return
            self.kill(self.rng.randrange(len(self.nodes)))

    def kill(self, i):
        if self.rng.random() < 0.5:
            stop_node(self.nodes[i])
            self.told["node"] += 1
            self.nodes[i] = start_node(f"--address={self.address}", SMALL)
            return
        family = psutil.Process(self.nodes[i].pid).children(recursive=True)
        working = [p for p in family if "ray::simulated" in command(p)]
        if working:
            self.rng.choice(working).kill()
            self.told["worker"] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("jobs", 500), ("nodes", 8), ("kills", 24), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nodes end with it
    address = f"127.0.0.1:{free_port()}"
    port = address.split(":")[1]
    head = start_node("--head", f"--port={port}", "--include-dashboard=false", SMALL, cpus=0)
    nodes = []
    try:
        for _ in range(options.nodes):
            nodes.append(start_node(f"--address={address}", SMALL))
        with tempfile.TemporaryDirectory() as folder:
            passed = measure(Path(folder), address, nodes, options)
    finally:
        for node in (*nodes, head):
            stop_node(node)
    return 0 if passed else 1


def measure(folder, address, nodes, options):
    study, out = study_in(folder, options.jobs), folder / "out"
    engine, share = engines.RayEngine(out, address), [0.0]
    engine._task = engine._ray.remote(num_cpus=1, max_retries=0)(simulated)
    rng = random.Random(options.seed)
    killer, began = Killer(nodes, address, options.kills, rng, lambda: share[0]), time.monotonic()

    def tell(frame, study):
        share[0] = float((frame["state"] == "done").mean())

    killer.start()
    frame = studies.sweep(study, out, engine, tell=tell)
    killer.ended.set()
    killer.join(120)
    seconds = time.monotonic() - began
    lost = int((frame["state"] != "done").sum())
    wrong = int((frame["acc"] != frame["x"] / 1000).sum())
    again = int((frame["attempts"] > 1).sum())
    assert not killer.error, killer.error
    print(
        f"| {options.jobs} | {len(nodes)} | {killer.told['node']} nodes,"
        f" {killer.told['worker']} workers | {again} | {frame['attempts'].max()} | {lost} | {wrong}"
        f" | {seconds:.0f} |"
    )
    return lost == wrong == 0


if __name__ == "__main__":
    sys.exit(main())
