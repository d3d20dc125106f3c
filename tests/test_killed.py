"""A run that is killed (SIGKILL) again and again ends with the numbers of one that is not."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abdlab.checkpoint import read_card, read_weights

KILLS = 20


@pytest.mark.slow
def test_twenty_kills_and_the_same_weights(tmp_path):
    """A student with dropout, a source that is a mix, the vaccine, and TriggerUnlearning's
    inverted stamps; killed at random moments of every kind: while it begins, between steps, in a
    step, while it saves.
    """
    seed = random.randrange(2**32)
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("killed_run.py"),
            tmp_path,
            str(KILLS),
            str(seed),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    reached = [int(line) for line in done.stdout.split()]
    assert len(reached) == KILLS
    assert reached == sorted(reached), "a kill takes no checkpoint back"
    assert len({*reached}) > 5, f"seed {seed}: the kills hit one place, {reached}"
    whole, killed = (read_weights(tmp_path / f"{n}.safetensors")[0] for n in ("whole", "killed"))
    wrong = [name for name, value in whole.items() if not torch.equal(value, killed[name])]
    assert wrong == [], f"seed {seed}, killed after the checkpoints of {reached}"
    report = read_card(tmp_path / "whole.safetensors")["report"]
    assert report["from_pseudo_batch"] < max(reached), f"seed {seed}: no stamps yet, {reached}"
    assert len(report["trigger_pixels"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{part}.safetensors" for name in ("whole", "killed") for part in ("", "-run")
    }, "a kill in the midst of a write leaves nothing behind"
