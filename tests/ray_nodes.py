"""Ray nodes on this machine, which tests start and kill."""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def start_node(*words, cpus=1):
    """A Ray node in a process group of its own. Ray gives a node 30 seconds, which a
    busy machine may not grant at once.
    """
    ray = Path(sys.executable).with_name("ray")
    for _ in range(3):
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the node writes to it for as long as it lives)
        node = subprocess.Popen(
            [ray, "start", "--block", f"--num-cpus={cpus}", "--disable-usage-stats", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while node.poll() is None:
            log.seek(0)
            if "Ray runtime started" in (told := log.read()):
                return node
            time.sleep(0.5)
        stop_node(node)
    raise AssertionError(f"no Ray node could be started: {told[-1000:]}")


def stop_node(node):
    """Kill all that belongs to the node, as a machine that fails would, and nobody
    else's Ray.
    """
    try:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()
