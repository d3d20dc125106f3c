"""A defense's weights that change between pseudo-batches: asked for while the run goes
on, or planned beforehand.
"""

import pytest
import torch

from abdlab import ZSKT, SelfRetrospection, ShufflingVaccine, TriggerUnlearning, distill
from abdlab.defenses.plans import plans, tune


def source():
    return ZSKT((1, 8, 8), pseudo_batches=6, batch_size=8, student_steps=2, z=5, width=4)


def defenses(alpha=0.5, weight=1.0):
    sv = ShufflingVaccine(layers=3, warmup=0, verify=False, alpha=alpha)
    return [sv, SelfRetrospection(start=0.5, inner_steps=2, weight=weight)]


def run(wrn, active, ask=None, **settings):
    """The events, and the student's weights; ``ask(step)`` is called between the steps."""
    student, events = wrn(seed=2), []
    for step in distill(wrn(seed=1), student, source(), defenses=active, device="cpu", **settings):
        events += [event for event in step.events if "->" in event]
        if ask:
            ask(step)
    return events, student.state_dict()


def same(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_what_was_asked_for_equals_what_was_planned(wrn):
    asked = defenses()

    def ask(step):
        if step.index == 2:
            tune(asked[0], alpha=0.1)
        if step.index == 4:
            tune(asked[1], weight=3.0)

    events, live = run(wrn, asked, ask)
    assert events == [
        "sv: alpha 0.5 -> 0.1 from pseudo-batch 2 on",
        "sr: weight 1 -> 3 from pseudo-batch 4 on",
    ]
    assert plans(asked[0]) == {"alpha": [(0, 0.5), (2, 0.1)]}
    planned = defenses([[0, 0.5], [2, 0.1]], [[0, 1.0], [4, 3.0]])
    again = run(wrn, planned)
    assert again[0] == events
    assert same(again[1], live)
    assert not same(run(wrn, defenses())[1], live)


def test_a_plan_is_followed_after_a_resume(wrn, tmp_path):
    events, whole = run(wrn, defenses([[0, 0.5], [2, 0.1], [4, 0.9]]))
    assert events[1] == "sv: alpha 0.1 -> 0.9 from pseudo-batch 4 on"
    student, path = wrn(seed=2), tmp_path / "run.safetensors"
    stream = distill(
        wrn(seed=1),
        student,
        source(),
        defenses=defenses([[0, 0.5], [2, 0.1], [4, 0.9]]),
        device="cpu",
        checkpoint=path,
    )
    for step in stream:
        if step.index == 3:
            break
    stream.close()
    rest, weights = run(wrn, defenses([[0, 0.5], [2, 0.1], [4, 0.9]]), checkpoint=path)
    assert rest == events[1:]
    assert same(weights, whole)


def test_an_attribute_that_nobody_plans_stays_a_plain_one(wrn):
    active = defenses()

    def ask(step):
        active[1].weight = 5.0

    assert not same(run(wrn, active, ask)[1], run(wrn, defenses())[1])
    assert active[1].weight == 5.0


def test_asking_for_the_same_value_is_no_change(wrn):
    active = defenses()
    assert run(wrn, active, lambda step: tune(active[0], alpha=0.5))[0] == []
    assert plans(active[0])["alpha"] == [(0, 0.5)]


def test_only_what_is_tunable_can_be_asked_for():
    sv, sr = defenses()
    with pytest.raises(ValueError, match="did you mean 'alpha'"):
        tune(sv, alfa=1)
    with pytest.raises(ValueError, match="unknown tunable setting of sr 'start'"):
        tune(sr, start=0.1)


@pytest.mark.parametrize(
    "plan", [[], [[1, 0.5]], [[0, 0.5], [0, 0.1]], [[0, 0.5], [5, 0.1], [3, 0.2]], [[0]]]
)
def test_a_plan_begins_at_0_and_goes_up(plan):
    with pytest.raises(ValueError, match="goes up"):
        ShufflingVaccine(alpha=plan)


def test_trigger_unlearning_takes_a_plan_too():
    assert TriggerUnlearning(inner_steps=[[0, 5], [3, 7]]).inner_steps == 5
    with pytest.raises(ValueError, match="at least 1"):
        TriggerUnlearning(inner_steps=[[0, 0], [3, 7]])
