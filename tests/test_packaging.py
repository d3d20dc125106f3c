"""The two lists of dependencies agree, notebooks are clean, and the Makefile's commands
are those of the README.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from abdlab import batch

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def test_environment_yml_names_the_same_dependencies_as_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.sub(r"^[a-z0-9_-]+", lambda m: CONDA_NAMES.get(m[0], m[0]), d)
        for d in project["dependencies"]
    }
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert set(conda) == wanted | {f"python{project['requires-python']}", "pip"}


def test_every_dependency_states_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    everything = [*project["dependencies"], *itertools.chain(*extras)]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", d) for d in everything)


@pytest.mark.slow
def test_the_lowest_versions_can_be_installed_together(tmp_path):
    """Every lower bound is a version that exists and goes with all the others: pinned to
    them, a resolver (uv's, which is quick, else pip's) finds the rest.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pins = tmp_path / "lowest.txt"
    pins.write_text("\n".join(d.replace(">=", "==") for d in stated))
    if uv := shutil.which("uv"):
        command = [uv, "pip", "compile", "-q", "--python", sys.executable, str(pins)]
    else:
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "-r", str(pins)]
        command += ["--ignore-installed", "--only-binary", ":all:", "--retries", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    unreachable = (
        "ailed to (fetch|establish)|client error|timed out|No module named pip|versions: none"
    )
    if done.returncode and (found := re.search(f".*({unreachable}).*", done.stderr)):
        pytest.skip(f"no index of packages can be reached: {found[0].strip()[:200]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", batch.notebooks().values(), ids=lambda p: p.stem)
def test_notebooks_are_stripped_tagged_and_thin(path):
    book = json.loads(path.read_text())
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]
    source = "\n".join("".join(c["source"]) for c in code)
    assert "sys.path" not in source
    assert "def " not in source
    assert "save_metrics" in source


def test_the_landing_page_leads_to_every_notebook():
    book = json.loads((ROOT / "notebooks/index.ipynb").read_text())
    text = "".join(line for cell in book["cells"] for line in cell["source"])
    linked = re.findall(r"\]\((.*?)\)", text)
    assert {f"{name}.ipynb" for name in batch.notebooks()} <= {*linked}
    assert all((ROOT / "notebooks" / place).exists() for place in linked)


@pytest.mark.parametrize("path", batch.notebooks().values(), ids=lambda p: p.stem)
def test_every_parameter_has_a_help_text(path):
    known = batch.parameters(path)
    if "study" not in known:  # a report reads what others ran
        assert {"run", "preset", "device", "overrides"} <= known.keys()
    assert all(entry["help"] for entry in known.values())


def test_ci_calls_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make demo" in (ROOT / "README.md").read_text()


def test_no_device_is_written_into_the_library():
    for path in (ROOT / "abdlab").rglob("*.py"):
        assert not re.search(r"\.cuda\(|device=['\"](cuda|mps)|\.to\(['\"]", path.read_text()), path


def test_the_core_needs_no_jupyter():
    """On a machine without the notebook stack, importing abdlab and training still
    works.
    """
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(['papermill', 'ipywidgets', 'jupyterlab',"
        " 'captum', 'IPython', 'typer']))\n"
    )
    code = blocked + "import abdlab; print(len(abdlab.load('digits', device='cpu').test_images))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "500", done.stderr
