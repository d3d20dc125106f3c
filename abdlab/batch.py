"""Notebooks through papermill: which there are, what they take, and one run of one of
them without a browser.
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
import typing
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import papermill
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from abdlab.errors import did_you_mean
from abdlab.stream import HEADLESS

_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}


class NotebookFailed(RuntimeError):
    """A cell raised an error; the executed notebook is kept up to it."""


def notebooks() -> dict[str, Path]:
    """The notebooks that come with abdlab, by name, in walking order."""
    here = Path(__file__).parent
    # installed, they lie inside the package; in a checkout, beside it
    folder = here / "notebooks" if (here / "notebooks").is_dir() else here.parent / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[0-9]*.ipynb"))}


def find_notebook(name: str | Path) -> Path:
    """A notebook by its name ("02_distillation", or just "02") or by its path.

    Raises:
        ValueError: when there is none, with a "did you mean".
    """
    if Path(name).suffix == ".ipynb":
        if Path(name).is_file():
            return Path(name)
        name = Path(name).stem
    ours = notebooks()
    found = [
        path for stem, path in ours.items() if stem == str(name) or stem.split("_")[0] == str(name)
    ]
    if not found:
        raise ValueError(did_you_mean("notebook", str(name), ours))
    return found[0]


def parameters(notebook: str | Path) -> dict[str, dict]:
    """A notebook's own parameters: name -> {"default", "type", "help"}, read from its
    ``parameters`` cell without running it.
    """
    found = papermill.inspect_notebook(str(find_notebook(notebook)))
    out = {}
    for name, entry in found.items():
        default = ast.literal_eval(entry["default"])
        kind = (
            entry["inferred_type_name"]
            if entry["inferred_type_name"] != "None"
            else type(default).__name__
        )
        out[name] = {"default": default, "type": kind.strip("\"' "), "help": entry["help"]}
    return out


def check_parameters(
    notebook: str | Path, given: Mapping[str, Any], known: Mapping[str, dict] | None = None
) -> dict[str, Any]:
    """The given parameters with their types checked against the notebook's own; strings
    are read as Python literals.

    Args:
        known: what :func:`parameters` returned for the notebook, to spare reading it
            again.

    Raises:
        ValueError: for an unknown name (with a "did you mean") or a value of another
            type.
    """
    known, out = parameters(notebook) if known is None else known, {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(did_you_mean(f"parameter of {Path(notebook).stem}", name, known))
        out[name] = _typed(name, value, known[name]["type"])
    return out


def _typed(name: str, value: Any, kind: str) -> Any:
    optional = kind.startswith("Optional[")
    base = kind.removeprefix("Optional[").rstrip("]") if optional else kind
    wanted = _TYPES.get(base.split("[")[0])
    if isinstance(value, str) and wanted is not str:
        try:
            value = ast.literal_eval(
                {"true": "True", "false": "False", "none": "None"}.get(value.lower(), value)
            )
        except (ValueError, SyntaxError):
            raise ValueError(f"parameter {name} takes {_say(kind)}, not {value!r}") from None
    elif isinstance(value, str) and optional and value == "None":
        value = None
    if value is None and (optional or wanted is None):
        return None
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is not None and type(value) is not wanted:
        raise ValueError(f"parameter {name} takes {_say(kind)}, not {value!r}")
    return value


def _say(kind: str) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "bool": "True or False",
        "list": "a list",
        "dict": "a dict",
    }
    if kind.startswith("Optional["):
        return f"{_say(kind.removeprefix('Optional[').rstrip(']'))}, or None"
    return words.get(kind.split("[")[0], kind)


def execute(
    notebook: str | Path,
    output: str | Path,
    given: Mapping[str, Any] | None = None,
    log: TextIO | None = None,
    threads: int | None = None,
) -> Path:
    """Run a notebook through papermill in a kernel of its own, and keep the executed
    copy.

    Args:
        notebook: a name or a path.
        output: the executed notebook, also kept when a cell fails.
        given: parameters, checked before a kernel starts.
        log: where the kernel's output and progress go while it runs; by default
            standard error.
        threads: of the kernel's arithmetic; by default torch's own choice.

    Raises:
        ValueError: for bad parameters. NotebookFailed: when a cell raises, with its
            error in one sentence.
    """
    path, output = find_notebook(notebook), Path(output)
    given = check_parameters(path, given or {})
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {output.parent}: {error.strerror}; choose another folder"
        ) from error
    try:
        run_kernel(path, output, given, log or sys.stderr, threads)
    except PapermillExecutionError as error:
        raise NotebookFailed(
            f"{path.name}, cell {error.exec_count}: {error.ename}: {error.evalue} (see {output})"
        ) from None
    return output


def run_kernel(
    notebook: Path | NotebookNode,
    output: Path,
    given: Mapping[str, Any],
    log: TextIO,
    threads: int | None = None,
    folder: str | Path | None = None,
) -> None:
    """papermill with our environment and nothing checked: a kernel in ``folder`` (by
    default the working directory).
    """
    extra = {HEADLESS: "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    extra |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with _environment(extra), tempfile.TemporaryDirectory(prefix="abdlab-") as sockets:
        # not TCP, which every user of the machine can reach, but files of this user;
        # each kernel needs names of its own
        private = (
            {"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}
            if os.name == "posix"
            else {}
        )
        papermill.execute_notebook(
            notebook if isinstance(notebook, NotebookNode) else str(notebook),
            str(output),
            dict(given),
            kernel_name="python3",
            progress_bar=False,
            stdout_file=log,
            stderr_file=log,
            cwd=str(folder or os.getcwd()),
            config=Config(private),
        )


@contextmanager
def _environment(values: Mapping[str, str]) -> typing.Iterator[None]:
    """Environment variables for the kernels that start inside the block."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
