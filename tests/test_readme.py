"""The README's code runs: a stranger's teacher is distilled without any test data in
under 15 lines.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import abdlab

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

MODEL = """
from torch import nn

class TheirNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )

    def forward(self, x):
        return self.layers((x - 0.5) / 0.25)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::abdlab.defenses.VaccineNotFound")
def test_a_strangers_teacher_is_distilled_without_data(tmp_path, monkeypatch, capsys):
    code = next(block for block in BLOCKS if "TheirNet" in block)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_model.py").write_text(MODEL)
    space = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    save_file(space["TheirNet"]().state_dict(), tmp_path / "their_teacher.safetensors")
    assert "pseudo_batches=2000" in code
    exec(
        code.replace(
            "pseudo_batches=2000", "pseudo_batches=2, batch_size=16, student_steps=1, width=4"
        ),
        {},
    )
    student = abdlab.load_model(tmp_path / "student.safetensors")
    assert abdlab.predict(student, torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert "'layers': ['layers.2', 'layers.4']" in capsys.readouterr().out


def test_the_library_block_runs():
    space = {}
    exec(next(block for block in BLOCKS if "abdlab.attacks.poison(" in block), space)
    assert space["poisoned"].mask.sum() == 130
    assert len(space["exam"].triggered) < len(space["data"].test_images) == 500


def test_the_pictures_are_there_and_small():
    names = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(names) == 2
    assert sum((Path(__file__).parents[1] / name).stat().st_size for name in names) < 200_000
