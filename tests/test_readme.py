"""The pages say what is so: links lead somewhere, commands and options exist, code runs,
results are those of the CSV files, and the README is short.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

import abdlab
from abdlab import batch
from abdlab.cli import app
from abdlab.labels import Label
from abdlab.studies import book, read_study

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "notebooks" / "studies"
PAGES = {
    "README.md": ROOT / "README.md",
    "studies": STUDIES / "README.md",
    "tuning": STUDIES / "tuning.md",
}
README = PAGES["README.md"].read_text()
COMMANDS = typer.main.get_command(app).commands

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


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(), re.DOTALL)


def prose(page: str) -> str:
    return re.sub(r"```.*?```", "", PAGES[page].read_text(), flags=re.DOTALL)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_readme_is_short():
    assert len(README.encode()) <= 13_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", prose(page))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, section = link.partition("#")
        target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if section:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert section in map(anchor, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    """Every ``abdlab ...`` in a block of shell, and every command named in prose."""
    shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in shell.splitlines() if line.strip()]
    for program, *words in lines:
        if Path(program).name == "abdlab":
            command, options = COMMANDS[words[0]], [w for w in words if re.match("--?[a-z]", w)]
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            assert set(options) <= known, words
            if words[0] == "run":
                notebook = batch.find_notebook(words[1])
                at = [i for i, word in enumerate(words) if word == "-p"]
                given = {words[i + 1]: words[i + 2] for i in at}
                assert given.keys() <= batch.parameters(notebook).keys(), words
                abdlab.settings("quick/digits", json.loads(given.get("overrides", "{}")))
                for method in json.loads(given.get("methods", "[]")):
                    assert Label.parse(method).parts
            if words[0] == "sweep" and words[1].endswith(".yaml") and "/" in words[1]:
                assert (ROOT / words[1]).is_file(), words
            if words[0] == "presets" and len(words) > 1:
                assert words[1] in abdlab.PRESETS
    for name in re.findall(r"`(?:\.venv/bin/)?abdlab ([a-z]+)", prose(page)):
        assert name in COMMANDS, name


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"`make ([a-z-]+)`", prose(page)) + re.findall(
        r"^make ([a-z-]+)", "\n".join(blocks(page, "sh")), re.MULTILINE
    )
    for target in set(named):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_notebook_and_every_study_is_listed():
    for name in batch.notebooks():
        assert f"| `{name}` |" in README
    text = PAGES["studies"].read_text()
    for path in STUDIES.glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in text


def test_the_tables_are_what_the_command_writes():
    book.write_book(STUDIES, check=True)


def test_no_table_of_results_is_written_by_hand():
    """Prose of the page has no row with a figure such as 98.0/91.0; tables come from the
    files.
    """
    rows = [row for row in (STUDIES / "book.md").read_text().splitlines() if row.startswith("|")]
    assert not [row for row in rows if re.search(r"\d\.\d+ ?/ ?\d", row)]


def test_the_readmes_table_is_one_of_them():
    ours = re.search(r"(\| method \| ACC \| ASR \|\n(?:\|.*\n)+)", README)[1].strip()
    spec = {
        "where": {"study": "quick-preset", "setting": "sixth"},
        "rows": {"method": "name"},
        "cells": {"ACC": "{acc}", "ASR": "{asr}"},
    }
    assert ours == book.table(book.read_results(STUDIES / "results"), spec)


def test_the_pictures_are_there_and_small():
    names = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(names) == 2
    assert sum((ROOT / name).stat().st_size for name in names) < 200_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::abdlab.defenses.VaccineNotFound")
def test_a_strangers_teacher_is_distilled_without_data(tmp_path, monkeypatch, capsys):
    code = next(block for block in blocks("README.md", "python") if "TheirNet" in block)
    statements = [line for line in code.splitlines() if line.strip() and line[0] != "#"]
    assert len(statements) <= 15
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_model.py").write_text(MODEL)
    space = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    save_file(space["TheirNet"]().state_dict(), tmp_path / "their_teacher.safetensors")
    short = {
        "pseudo_batches=2000": "pseudo_batches=2, batch_size=16, student_steps=1, width=4",
        "TriggerUnlearning()": "TriggerUnlearning(inner_steps=2, renewals=0)",
    }
    for long, quick in short.items():
        assert long in code
        code = code.replace(long, quick)
    exec(code, {})
    student = abdlab.load_model(tmp_path / "student.safetensors")
    assert abdlab.predict(student, torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert "'layers': ['layers.2', 'layers.4']" in capsys.readouterr().out


def test_the_widgets_block_runs(tmp_path, monkeypatch):
    code = next(block for block in blocks("README.md", "python") if "widgets" in block)
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_every_block_of_the_readme_is_run_here():
    assert len(blocks("README.md", "python")) == 2


def test_the_library_blocks_run(tmp_path, monkeypatch):
    first, second = blocks("studies", "python")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(first, space)
    assert space["poisoned"].mask.sum() == 130
    assert len(space["exam"].triggered) < len(space["data"].test_images) == 500
    torch.manual_seed(0)
    abdlab.save_model("clean_teacher.safetensors", abdlab.build("wrn-10-1", classes=10, channels=1))
    data = space["data"]  # 64 images will do
    images, labels = data.train_images[:64], data.train_labels[:64]
    space["data"] = replace(data, train_images=images, train_labels=labels)
    exec(second, space)
    assert space["trigger"].name == "l2_inv"


def test_the_yaml_of_a_study_is_one(tmp_path):
    (text,) = blocks("studies", "yaml")
    (tmp_path / "study.yaml").write_text(text)
    assert len(read_study(tmp_path / "study.yaml").jobs) == 8
