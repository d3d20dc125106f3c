"""The rules of the house: who may import whom, how large things may be, where names live."""

import ast
import inspect
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import abdlab
from abdlab.defenses import DEFENSES, Defense
from abdlab.sources import SOURCES

ROOT = Path(abdlab.__file__).parents[1]
FILES = sorted((ROOT / "abdlab").rglob("*.py"))

#: From the ground up: a module imports modules of its own storey and below, never above.
STOREYS = [
    [
        "errors",
        "registry",
        "identity",
        "home",
        "labels",
        "threads",
        "processes",
        "graphs",
        "side_by_side",
        "features",
    ],
    ["losses", "optim", "stream", "augment", "pickles"],
    [
        "folders",
        "data",
        "families",
        "models",
        "strangers",
        "fitting",
        "checkpoint",
        "probe",
        "owned",
    ],
    ["attacks"],
    ["sources"],
    ["inversion", "suspects"],
    ["purifiers"],
    ["defenses"],
    ["objectives"],
    ["methods", "values", "train", "train_together", "distill"],
    ["evaluate", "watermarks", "activations", "detectors", "audit"],
    ["paper_presets", "presets", "settings", "checks"],
    ["runs"],
    ["teachers"],
    ["students"],
    ["experiments"],
    ["forecast"],
    ["inspection", "plots", "defend"],
    ["studies", "batch"],
    ["widgets"],
    ["cli", "cli_report", "cli_audit", "cli_plan", "__main__"],
]
#: what only the outermost rooms may import
HEAVY = {"papermill", "ray", "seaborn", "ipywidgets", "anywidget", "IPython", "nbclient"}
HEAVY |= {"plotly"}
#: rooms that may: (room, package)
ALLOWED = {
    *(("widgets", name) for name in HEAVY),
    *(("studies", name) for name in HEAVY),
    *(("batch", name) for name in HEAVY),
    *(("cli", name) for name in HEAVY),
    *(("cli_report", name) for name in HEAVY),
    ("plots", "seaborn"),
    ("plots", "IPython"),  # a notebook's figures ask who shows them
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """The abdlab modules that a file imports, also inside functions."""
    package = module_of(path) if path.stem == "__init__" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module if node.level == 0 else f"{package}.{node.module or ''}".rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield name


GRAPH = {name: {*imports(path)} - {name, "abdlab"} for name, path in MODULES.items()}


def room(module):
    return module.split(".")[1] if "." in module else ""


def storey(module):
    return next(i for i, names in enumerate(STOREYS) if room(module) in names)


def test_every_room_has_a_storey():
    rooms = {room(module) for module in MODULES if room(module)}
    assert rooms <= {name for names in STOREYS for name in names}


def test_nothing_imports_upwards():
    wrong = [
        f"{module} -> {other}"
        for module, others in GRAPH.items()
        if room(module)
        for other in others
        if room(other) and storey(other) > storey(module)
    ]
    assert wrong == []


def test_there_is_no_circle():
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for other in sorted(GRAPH[module]):
                # a package hands the names of its own modules on
                if not module.startswith(f"{other}."):
                    visit(other)
            done.add(open_.pop())

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("wing", ["sources", "defenses", "purifiers", "inversion"])
def test_what_a_defender_uses_reaches_neither_attacks_nor_evaluation(wing):
    seen, waiting = set(), [m for m in GRAPH if room(m) == wing]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += GRAPH[module]
    assert not {m for m in seen if room(m) in ("attacks", "evaluate", "audit")}


def test_the_core_imports_nothing_of_jupyter_and_no_plots_and_kernels_no_papermill():
    code = (
        "import sys, abdlab; "
        f"print(*sorted({HEAVY | {'matplotlib', 'jupyterlab'}!r} & {{*sys.modules}}))"
    )
    # nor does a kernel pay for what runs kernels (nbformat alone takes 1.5 s), or anybody
    # for the compiler that torchvision drags in
    slow = {"nbformat", "papermill", "nbclient", "jsonschema", "torch._dynamo"}
    code += (
        "; import abdlab.batch, abdlab.studies.sentences, abdlab.cli; "
        f"print(*sorted({slow!r} & {{*sys.modules}}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_heavy_packages_stay_in_the_outermost_rooms():
    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top in HEAVY and (room(module), top) not in ALLOWED:
                    wrong.append(f"{module}: {top}")
    assert wrong == []


def test_registered_names_are_literals_nowhere_else():
    """A method's parts are named by a registry's row, a preset, the paper's table or a
    plot's colours; everything else asks.
    """
    names = {*SOURCES, *DEFENSES} - {"mixed", "clean"}  # these two are words as well
    at_home = re.compile(r"(sources|defenses|purifiers)/__init__|presets|studies/paper|plots")
    wrong = []
    for path in FILES:
        if at_home.search(str(path.relative_to(ROOT))):
            continue
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
            if isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = re.split(r"[+/]", node.value)
                if id(node) not in docs and parts[0] and {*parts} & names and len(parts) < 6:
                    default = node.value in ("zskt", "zskt+sv+tu")  # of a public parameter
                    if not default:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}")
    assert wrong == []


def test_labels_are_taken_apart_in_one_place():
    for path in FILES:
        if path.name not in ("labels.py", "triggers.py", "checks.py"):  # triggers have a + too
            assert not re.search(r"""(split|partition)\(["']\+["']\)""", path.read_text()), path


def test_sizes():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 480, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        assert max(map(len, lines), default=0) <= 100, path
    assert len((ROOT / "README.md").read_bytes()) <= 13_000


def parameters(cls):
    return len(inspect.signature(cls).parameters)


def test_constructors_have_few_parameters():
    assert parameters(DEFENSES["sr"]) <= 14
    assert parameters(DEFENSES["tu"]) <= 16
    assert statistics.median(map(parameters, [*SOURCES.values(), *DEFENSES.values()])) <= 12


def test_the_contract_of_a_defense_is_short():
    assert len([name for name in dir(Defense) if not name.startswith("_")]) <= 14


def public_docstrings():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            if text := ast.get_docstring(node):
                yield f"{module}.{node.name}", text


def test_docstrings_are_short():
    long = [f"{n} {len(t.split())}" for n, t in public_docstrings() if len(t.split()) > 200]
    assert long == []


def test_every_source_and_defense_has_an_example():
    for cls in [*SOURCES.values(), *DEFENSES.values()]:
        assert ">>>" in (inspect.getdoc(cls) or ""), cls


def test_one_spelling():
    for path in [*FILES, ROOT / "README.md"]:
        assert not re.search(r"\b[Dd]efence", path.read_text()), path
