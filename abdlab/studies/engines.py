"""Where a study's jobs run: spawned processes on this machine, or a Ray cluster. Both
schedule by themselves; we only submit.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pebble import ProcessPool

from abdlab.batch import own_folder
from abdlab.processes import end_with, skip_grammars
from abdlab.studies.job import run_job

#: files that a job leaves on the worker: only a run that goes on needs them
_STAYS = (".lock",)


def default_slots(gpus: int | None = None) -> int:
    """Jobs at a time on this machine: one per GPU, or else one per core."""
    return (torch.cuda.device_count() if gpus is None else gpus) or os.cpu_count() or 1


class LocalEngine:
    """Spawned processes on this machine, which end with it: a killed sweep leaves no
    job behind.

    Args:
        slots: jobs at a time; by default one per GPU, or else one per core.
        gpus: GPUs to share out, one per job; by default all. A job sees only its own
            (CUDA_VISIBLE_DEVICES).
    """

    def __init__(self, slots: int | None = None, gpus: int | None = None):
        self.gpus = torch.cuda.device_count() if gpus is None else gpus
        self.slots = slots or default_slots(self.gpus)
        self._pool = ProcessPool(
            self.slots, initializer=_begin, initargs=(os.getpid(),), context=get_context("spawn")
        )

    def submit(self, spec: dict) -> Future:
        return self._pool.schedule(_local_job, args=(spec, self.gpus))

    def close(self, now: bool = False) -> None:
        if now:
            self._pool.stop()
        else:
            self._pool.close()
        self._pool.join()


class RayEngine:
    """Tasks on a Ray cluster (the extra ``ray``), each with its CPUs and GPUs.

    Args:
        address: of a cluster to join ("auto" finds the one that this machine belongs
            to); None starts one on this machine.
        cpus, gpus: that a job reserves; the kernel's threads are the study's.
        slots: CPUs of a cluster that is started here, in jobs; by default all cores.
        out: the study's folder.
        shared: whether every node sees ``out`` under the same path; None asks each
            node. If not, files travel with the jobs and their results, and a job whose
            node dies starts afresh.

    Raises:
        ValueError: when Ray is not installed, or no cluster answers at the address.
    """

    def __init__(
        self,
        out: str | Path,
        address: str | None = None,
        *,
        cpus: int = 1,
        gpus: float = 0,
        slots: int | None = None,
        shared: bool | None = None,
    ):
        try:
            import ray
        except ImportError:
            raise ValueError(
                "Ray is not installed: pip install 'abdlab[ray]', or use the local engine"
            ) from None
        if address and address != "auto":
            _check_port(address)
        self._ray, options = ray, {"log_to_driver": False, "include_dashboard": False}
        if address:
            options.pop("include_dashboard")
        else:
            options["num_cpus"] = (slots or max(1, (os.cpu_count() or 1) // cpus)) * cpus
        try:
            ray.init(address=address or "local", logging_level="ERROR", **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address or 'this machine'}: {error}"
            ) from None
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1) // cpus))
        self.token = uuid.uuid4().hex
        self.out = Path(out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self._mark = self.out / f".ray-{self.token}"
        self._mark.touch()
        self.shared = self._all_see() if shared is None else shared
        # our own loop tries again, and counts: a task that Ray repeats by itself would
        # be repeated twice
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_ray_job)

    def submit(self, spec: dict) -> Future:
        return self._task.remote(
            {**spec, "mark": str(self._mark) if self.shared else None}
        ).future()

    def close(self, now: bool = False) -> None:
        self._mark.unlink(missing_ok=True)
        self._ray.shutdown()

    def _all_see(self) -> bool:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self._ray.remote(num_cpus=0)(_sees)
        nodes = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        there = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote(
                str(self._mark)
            )
            for n in nodes
        ]
        return all(self._ray.get(there))


def _check_port(address: str) -> None:
    """Raise ValueError when nothing listens at HOST:PORT: Ray itself waits for 40
    seconds there, and then ends the process.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        told = f"{address} is no HOST:PORT" if isinstance(error, ValueError) else error
        raise ValueError(f"no Ray cluster answers at {address}: {told}") from None


def _sees(path: str) -> bool:
    return Path(path).exists()


def _begin(parent: int) -> None:
    """A worker's first call: it ends when the process that started it has, and its
    kernel ends with it.
    """
    skip_grammars()
    end_with(parent)


def _local_job(spec: dict, gpus: int) -> dict:
    with _own_gpu(gpus) if gpus else nullcontext():
        return run_job(spec)


@contextmanager
def _own_gpu(count: int) -> Iterator[None]:
    """One of this machine's GPUs for the kernels that start inside the block; waits
    while all are taken by other jobs.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = before.split(",") if before else [str(i) for i in range(count)]
    locks = {
        name: FileLock(Path(tempfile.gettempdir()) / f"abdlab-gpu-{name}.lock") for name in names
    }
    while True:
        for name, lock in locks.items():
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            try:
                yield
            finally:
                os.environ.pop("CUDA_VISIBLE_DEVICES")
                if before is not None:
                    os.environ["CUDA_VISIBLE_DEVICES"] = before
                lock.release()
            return
        time.sleep(0.5)


def _ray_job(spec: Mapping[str, Any]) -> dict:
    """In a Ray worker: in place where the study's folder is seen, else in a folder of
    its own whose files come back.
    """
    _begin(os.getppid())
    if spec["mark"]:
        if not Path(spec["mark"]).exists():
            raise RuntimeError(
                f"this node does not see {Path(spec['mark']).parent}: share the folder, or pass"
                " shared=False"
            )
        return run_job(spec)
    with own_folder("job-") as folder:
        result = run_job({**spec, "folder": str(folder)})
        files = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file() and p.name not in _STAYS
        }
        return {**result, "files": files}
