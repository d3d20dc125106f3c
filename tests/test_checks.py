"""Everything that can be known to be wrong is known before anything starts, and told in
one sentence.
"""

import contextlib
import io
import sys
from datetime import date
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from abdlab import batch, checks, cli
from abdlab.data import load
from abdlab.presets import PRESETS
from abdlab.settings import SECTIONS, settings
from abdlab.values import merged, read

QUICK = "quick/digits"
LABELS = ["clean", "zskt", "zskt+sv+sr", "cmi+sv", "dafl", "dfad", "dfq", "ood", "mixed+sr"]


def check(override, labels):
    checks.check_overrides(override)
    checks.check(settings(QUICK, override), labels)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_every_preset_says_can_run(preset):
    checks.check(settings(preset), LABELS)


def test_the_stand_in_has_the_shape_of_the_data():
    data, standing = load("digits"), checks.stand_in(settings(QUICK))
    assert (standing.shape, len(standing.classes)) == (data.shape, len(data.classes))
    assert (standing.shift, standing.flip) == (data.shift, data.flip)


@pytest.mark.parametrize(
    ("override", "labels", "sentence"),
    [
        ({"tu.hold": "no"}, [], "tu.hold takes True or False, not 'no'"),
        ({"tu.hold": 1}, [], "tu.hold takes True or False, not 1"),
        ({"sv.k": True}, [], "sv.k takes a whole number, not True"),
        ({"cmi.rounds": 2.0}, [], "cmi.rounds takes a whole number, not 2.0"),
        ({"teacher.lr": "0.1"}, [], "teacher.lr takes a number, not '0.1'"),
        ({"teacher.lr": None}, [], "teacher.lr takes a number, not None"),
        ({"teacher.lr": float("nan")}, [], "no finite number"),
        ({"dfad.milestones": 0.5}, [], "dfad.milestones takes a list"),
        ({"sr.inner_steps": [[0, 2.5]]}, [], "sr.inner_steps takes a whole number"),
        ({"attack.params": {"size": "4"}}, [], "badnet_sq's size takes a whole number"),
        ({"attack.more": [{"trigger": "blend", "target": 12}]}, [], "a class from 0 to 9"),
        ({"attack.more": 5}, [], "attack.more takes a list"),
        ({"attack.target": -1}, [], "attack.target is a class from 0 to 9 of digits, not -1"),
        ({"attack.trigger": "badnet_sp"}, [], "did you mean 'badnet_sq'"),
        ({"teacher.model": "resnet-19"}, [], "did you mean 'resnet-18'"),
        ({"data.size": 2}, [], "cannot see images of 2x2 pixels"),
        ({"data.name": "cifar"}, [], "unknown data set 'cifar': did you mean 'cifar10'"),
        ({"teacher.schedule": "cosin"}, [], "schedule is 'cosine' or 'onecycle'"),
        ({"student.precision": "fp16"}, ["zskt"], "did you mean 'bf16'"),
        ({"sv.layers": ["stage9"]}, ["zskt+sv"], "unknown layer of the teacher"),
        ({"sv.layers": 99}, ["zskt+sv"], "the last 99 convolutions"),
        ({"student.model": "resnet-18"}, ["zskt"], "as many stages"),
        ({"sr.start": 2.0}, ["zskt"], "start is a share"),
        ({"mixed.members": {"zsk": 1}}, ["mixed"], "did you mean 'zskt'"),
        # what a source or a defense would refuse only once it starts, or late in the run
        ({"zskt.student_lr": -0.1}, ["zskt"], "zskt.student_lr is at least 0, not -0.1"),
        ({"tu.inner_lr": -1}, ["zskt+tu"], "tu.inner_lr is at least 0, not -1"),
        ({"sr.lr": -1e-9}, ["zskt+sr"], "sr.lr is at least 0"),
        ({"clean.weight_decay": -1}, ["clean"], "weight_decay"),
        ({"cmi.z": -1}, ["cmi"], "cmi"),
        ({"cmi.width": 0}, ["cmi+sv"], "cmi"),
        ({"dafl.layer": "stage4"}, ["dafl"], "stage4"),
        ({"ood.lr": -1.0}, ["mixed"], "ood.lr is at least 0"),
        ({"tu.target": 10}, ["zskt+tu"], "tu.target is a class from 0 to 9 of digits, not 10"),
        ({"sv.k": 0}, ["zskt+sv"], "at least 1"),
        ({"sv.layers": []}, ["zskt+sv"], "at least 1"),
        ({}, ["zskt+sw"], "did you mean 'sv'"),
        ({}, ["zskt+sv+sv"], "names sv twice"),
        ({}, ["zskt sv"], "a method is"),
    ],
)
def test_what_could_not_run_is_one_sentence(override, labels, sentence):
    with pytest.raises(ValueError, match=r".+") as caught:
        check(override, labels)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_study_with_a_number_that_a_source_refuses_at_its_start_plans_nothing(here, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "notebook: 05\nparameters: {methods: [cmi]}\ngrid: {cmi.z: [2, -2]}\n"
    )
    code, out, err = here("sweep", tmp_path / "s.yaml", "--dry-run", "--out", tmp_path / "out")
    assert code == 2
    assert "a student cmi cannot be made" in err
    assert not out.count("jobs")


@pytest.mark.parametrize(
    "override",
    [
        {"sv.cap": 1, "tu.natural": None},  # a whole number is a number
        {"sv.alpha": [[0, 0.1], [10, 0.2]]},
        {"sv.layers": ["stage3.0.conv1"]},
        {"ood.drops": (0.1, 1)},
        {"attack.params": None},
        {"teacher.lr": "preset"},
    ],
)
def test_what_can_run_passes(override):
    check(override, ["zskt+sv+sr", "ood"])


def test_none_is_a_value_and_preset_is_the_presets():
    plain = settings(QUICK).values["sv"]["cap"]
    assert plain is not None
    assert settings(QUICK, {"sv.cap": None}).values["sv"]["cap"] is None
    assert settings(QUICK, {"sv.cap": "preset"}) == settings(QUICK)
    again = settings(QUICK, {"sv.cap": None, "dfad.clip": None})
    assert settings(QUICK, again.overrides()) == again


def test_a_notebooks_knobs_leave_what_is_none_to_the_preset():
    assert merged({"sv.alpha": None, "sr.weight": 2}, {"sv.cap": None}) == {
        "sr.weight": 2,
        "sv.cap": None,
    }
    # papermill's own -p hands a text over
    assert merged({"sv.alpha": 1}, '{"sv.alpha": null, "tu.hold": true}') == {
        "sv.alpha": None,
        "tu.hold": True,
    }
    assert settings(QUICK, '{"tu.hold": false}').values["tu"]["hold"] is False
    with pytest.raises(ValueError, match="overrides is a dict such as"):
        settings(QUICK, "tu.hold")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            '{"a": false, \'b\': None, "c": [null, True]}',
            {"a": False, "b": None, "c": [None, True]},
        ),
        ("[[0, 1e-3], [5, -2]]", [[0, 1e-3], [5, -2]]),
        ("TRUE", True),
        ("null", None),
    ],
)
def test_values_in_pythons_and_in_jsons_spelling(text, value):
    assert read(text) == value


@pytest.mark.parametrize("text", ["{'a': 1, \"a\": 2}", "[{'b': 1, 'b': 1}]"])
def test_a_key_that_stands_twice_is_refused(text):
    with pytest.raises(ValueError, match="stands twice"):
        read(text)


# --- any study, any -p ----------------------------------------------------------------

KINDS = [None, True, False, "5", 5, -1, 0, 0.5, 10**12, "preset", "none", [], [1, 2], {}, ["zskt"]]
KINDS += [
    "wrn-16-1",
    "zskt+sv",
    [[0, 1], [5, 2]],
    {"size": 3},
    float("nan"),
    date(2026, 1, 2),
    "\n",
]
KINDS += [{"sv.alpha": 1}, {"sv.alhpa": 1}, [{"trigger": "blend"}], {1: 2}, "blend", "quick/digits"]
NAMES = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
NAMES += ["seed", "methods", "label", "preset", "overrides", "sv_alpha", "source", "zskt.", "."]
VALUES = st.sampled_from(KINDS) | st.text(max_size=12) | st.integers() | st.floats()
PLAIN = st.recursive(VALUES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x))
AXES = st.dictionaries(st.sampled_from(NAMES), st.lists(VALUES, max_size=3) | PLAIN, max_size=3)
STUDIES = st.fixed_dictionaries(
    {"notebook": st.sampled_from(["02", "05_abd_ablation", "01", 3, "none", date(2026, 1, 1)])},
    optional={
        "title": PLAIN,
        "parameters": st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3) | PLAIN,
        "grid": AXES | PLAIN,
        "zip": AXES,
        "list": st.lists(AXES, max_size=2) | PLAIN,
        "seeds": st.just([0, 1]) | PLAIN,
        "exclude": st.lists(AXES, max_size=2) | PLAIN,
        "timeout": VALUES,
        "retries": VALUES,
        "threads": st.just(1) | VALUES,
        "gird": st.just({}),
    },
)


def command(folder, *words):
    """The command line in this process: (exit code, standard output and error)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["abdlab", *map(str, words)]),
        mock.patch.object(batch, "run_kernel", side_effect=AssertionError("started")),
        # tests/test_forecast.py times steps; here every run is too short for that
        mock.patch.object(sys.modules["abdlab.forecast"], "WORTH", 10**6),
        pytest.raises(SystemExit) as done,
    ):
        cli.main()
    return done.value.code, out.getvalue(), err.getvalue()


def plan_or_sentence(code, out, err):
    told = err.removeprefix("abdlab: ").removesuffix("\n")
    assert code in (0, 2), err
    assert "Traceback" not in err
    if code == 2:
        assert told
        assert len(told) <= 300
        assert "\n" not in told
    else:
        assert not err
        assert "nothing was started" in out or "shared teachers" in out


SLOW = hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True
)


#: one setting in one axis, the rest right: what is checked last is reached too
ONE = st.builds(
    lambda notebook, name, value: {"notebook": notebook, "grid": {name: [value]}},
    st.sampled_from(["00", "02", "05"]),
    st.sampled_from(NAMES),
    VALUES | PLAIN,
)


@SLOW
@given(STUDIES | ONE)
def test_any_study_is_a_plan_or_a_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "s.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))
    plan_or_sentence(*command(folder, "sweep", "s.yaml", "--dry-run", "--slots", 1))
    assert [path.name for path in folder.iterdir()] == ["s.yaml"]


@SLOW
@given(st.text(alphabet="abgnort:{}[]-,&*!?|>'\"#% \n\t1.", max_size=40))
def test_any_text_is_a_plan_or_a_sentence(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("text")
    (folder / "s.yaml").write_text(f"notebook: 05\n{text}")
    plan_or_sentence(*command(folder, "sweep", "s.yaml", "--dry-run", "--slots", 1))


@SLOW
@given(
    st.sampled_from(["00", "01", "02", "03", "04", "05"]),
    st.dictionaries(
        st.sampled_from([n for n in NAMES if "." not in n])
        | st.sampled_from(["run", "trigger", "target", "poison_rate", "defenses", "device"]),
        VALUES.map(str) | PLAIN.map(repr) | st.sampled_from(['{"tu.hold": true}', "{'sv.k': 2}"]),
        max_size=3,
    ),
)
def test_any_parameter_is_a_plan_or_a_sentence(tmp_path_factory, notebook, given_):
    folder = tmp_path_factory.mktemp("p")
    words = [word for key, value in given_.items() for word in ("-p", f"{key}={value}")]
    plan_or_sentence(*command(folder, "run", notebook, "--dry-run", *words))
    assert not [*folder.iterdir()]
