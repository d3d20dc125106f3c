"""Training objectives: each against a naive literal formula on a network of a few
numbers, and what they leave behind.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abdlab import train
from abdlab.attacks.triggers import Trigger
from abdlab.checks import check
from abdlab.objectives import OBJECTIVES, Objective, adversarial_accuracy, ascend, objective_of
from abdlab.settings import Settings, settings
from abdlab.teachers import WeakTeacher, clean_teacher, poisoned_teacher

LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def images(n=6, side=8):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(4))


def begun(name, model, images_=None, labels=LABELS, **values):
    """An objective that has started, with its own generator at seed 9."""
    objective = objective_of(name, values)
    given = images() if images_ is None else images_
    objective.start(model, given, labels, torch.Generator().manual_seed(9))
    return objective


def linear(weight):
    """Two classes, two pixels: logits are rows of weights times pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.tensor(weight)
    return model


class TestAscent:
    def test_two_steps_by_hand(self):
        """Class 0's logit is 3 x - y, class 1's is 0: the loss of label 0 climbs as x falls
        and y grows; four steps of .125 go to the walls, at .2 away and at 1.
        """
        model, image = linear([[3.0, -1.0], [0.0, 0.0]]), torch.tensor([[[[0.5, 0.9]]]])

        def loss(x):
            return F.cross_entropy(model(x), torch.tensor([0]), reduction="sum")

        one = ascend(loss, image, image, eps=0.2, steps=4)
        assert one.flatten().tolist() == pytest.approx([0.3, 1.0])
        one = ascend(loss, image, image, eps=0.2, steps=8)  # of .0625 each: the walls are near
        assert one.flatten().tolist() == pytest.approx([0.3, 1.0])
        # a step of 2.5 x .04 / 2 = .05 is cut to .04 at once
        one = ascend(loss, image, image, eps=0.04, steps=2)
        assert one.flatten().tolist() == pytest.approx([0.46, 0.94])

    def test_adversarial_accuracy_by_hand(self):
        """The first image wins by .2 in logits that lose up to .3 each way, the second by
        .8: one of two stays right.
        """
        model = linear([[1.0, 0.0], [0.0, 1.0]])
        given = torch.tensor([[[[0.5, 0.3]]], [[[0.9, 0.1]]]])
        labels = torch.tensor([0, 0])
        assert adversarial_accuracy(model, given, labels, eps=0.15, steps=5) == 0.5
        assert adversarial_accuracy(model, given, labels, eps=0.05, steps=5) == 1.0


class TestRobust:
    def test_pgd_is_the_cross_entropy_of_images_that_were_attacked(self, wrn):
        model, twin = wrn(classes=3).train(), wrn(classes=3).train()
        found = begun("pgd", model, eps=0.1, steps=2).losses(model, images(), LABELS)
        # by hand: a uniform start, then two signs of the eval-mode gradient
        noise = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(9)) * 0.2 - 0.1
        moved = (images() + noise).clamp(0, 1)
        judge = copy.deepcopy(twin).eval()
        for _ in range(2):
            moved.requires_grad_()
            F.cross_entropy(judge(moved), LABELS, reduction="sum").backward()
            moved = (moved + 0.125 * moved.grad.sign()).detach()
            moved = torch.minimum(torch.maximum(moved, images() - 0.1), images() + 0.1).clamp(0, 1)
        expected = F.cross_entropy(twin(moved), LABELS)
        assert found["adversarial"].item() == pytest.approx(expected.item(), rel=1e-4)

    def test_trades_adds_what_the_attacked_answers_differ_by(self, wrn):
        model, twin = wrn(classes=3).train(), wrn(classes=3).train()
        found = begun("trades", model, eps=0.1, steps=1, beta=3.0).losses(model, images(), LABELS)
        noise = 1e-3 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(9))
        moved = (images() + noise).requires_grad_()
        judge = copy.deepcopy(twin).eval()
        p = judge(images()).softmax(1).detach()
        (p * (p.log() - judge(moved).log_softmax(1))).sum().backward()
        moved = (moved + 0.25 * moved.grad.sign()).detach()
        moved = torch.minimum(torch.maximum(moved, images() - 0.1), images() + 0.1).clamp(0, 1)
        logits = twin(images())
        p, q = logits.softmax(1), twin(moved).softmax(1)
        apart = (p * (p / q).log()).sum() / 6
        assert found["cross_entropy"].item() == pytest.approx(
            F.cross_entropy(logits, LABELS).item(), rel=1e-5
        )
        assert found["trades"].item() == pytest.approx(3 * apart.item(), rel=1e-3)

    def test_the_universal_perturbation_climbs_by_hand(self):
        model, given = linear([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[[[0.5, 0.5]]]] * 2)
        labels = torch.tensor([0, 0])
        objective = begun("universal", model, given, labels, eps=0.05, lr=0.03)
        first = objective.losses(model, given, labels)
        assert first["universal"].item() == pytest.approx(first["cross_entropy"].item())
        assert objective.delta.flatten().tolist() == pytest.approx([-0.03, 0.03])
        second = objective.losses(model, given, labels)["universal"]
        # logits 2 * .47 - .53 and 0
        assert second.item() == pytest.approx(math.log(1 + math.exp(-0.41)), rel=1e-5)
        assert objective.delta.flatten().tolist() == pytest.approx([-0.05, 0.05])  # eps


class TestAdaptive:
    def test_clamped_counts_the_network_with_and_without_a_bound(self, wrn):
        model, twin = wrn(classes=3).train(), wrn(classes=3).train()
        objective = begun("clamped", model, k=1.0, weight=0.5)
        found = objective.losses(model, images(), LABELS)
        assert found["cross_entropy"].item() == pytest.approx(
            F.cross_entropy(twin(images()), LABELS).item(), rel=1e-5
        )
        for norm in [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.forward = literally_clamped(norm, 1.0)
        clamped = F.cross_entropy(twin(images()), LABELS).item()
        assert found["clamped"].item() == pytest.approx(0.5 * clamped, rel=1e-4)
        objective.finish(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in wrn(classes=3).modules()]
        assert model.state_dict().keys() == wrn(classes=3).state_dict().keys()

    def test_the_clamped_pass_leaves_no_statistics(self, wrn):
        model, twin = wrn(classes=3).train(), wrn(classes=3).train()
        begun("clamped", model, k=1.0).losses(model, images(), LABELS)
        twin(images())
        found, wanted = dict(model.named_buffers()), dict(twin.named_buffers())
        running = [name for name in wanted if "running" in name]
        assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in running)

    def test_a_network_without_batch_norm_cannot_be_clamped(self):
        with pytest.raises(ValueError, match="no batch norm"):
            begun("clamped", linear([[1.0, 0.0], [0.0, 1.0]]))

    def test_shuffled_copies_are_to_answer_evenly(self, wrn):
        model = wrn(classes=3).train()
        found = begun("shuffled", model, layers=1, weight=2.0, target=2).losses(
            model, images(), LABELS
        )
        name = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][-1]
        copied = copy.deepcopy(model).eval()
        kernel = copied.get_submodule(name).weight
        order = torch.randperm(kernel.shape[1], generator=torch.Generator().manual_seed(9))
        kernel.data = kernel.data[:, order]
        p = copied(images()[[2, 5]]).softmax(1)
        expected = (p * (3 * p).log()).sum(1).mean()
        assert found["shuffled"].item() == pytest.approx(2 * expected.item(), rel=1e-4)
        found["shuffled"].backward()
        assert model.get_submodule(name).weight.grad.abs().sum() > 0

    def test_without_an_image_of_the_target_nothing_is_added(self, wrn):
        model = wrn(classes=10).train()
        for name in ("shuffled",):
            found = begun(name, model, layers=1, target=7).losses(model, images(), LABELS)
            assert found.keys() == {"cross_entropy"}

    def test_costly_puts_its_triggers_on_clean_images_only(self, wrn):
        model = wrn(classes=3).train()
        objective = begun("costly", model, target=0, every=1, steps=2, weight=0.5, keep=2)
        found = objective.losses(model, images(), LABELS)
        assert len(objective.bank) == 2
        assert objective.bank.targets == [0]
        # the same draws, by hand
        chosen = torch.tensor([1, 2, 3, 5])
        assert torch.equal(objective.clean, images()[chosen])
        rng = torch.Generator().manual_seed(9)
        torch.randint(4, (128,), generator=rng), torch.randint(2**31, (), generator=rng)
        triggered = objective.bank.on(images()[chosen], rng)
        twin = wrn(classes=3).train()
        expected = F.cross_entropy(twin(triggered), LABELS[chosen]).item()
        assert found["costly"].item() == pytest.approx(0.5 * expected, rel=1e-4)

    def test_costly_needs_a_clean_image(self, wrn):
        with pytest.raises(ValueError, match="none is clean"):
            begun("costly", wrn(classes=3), labels=torch.ones(6, dtype=torch.int64), target=1)


class TestDormant:
    def test_losses_by_the_literal_formula(self, wrn):
        model, twin = wrn(classes=3).train(), wrn(classes=3).train()
        trigger = Trigger("badnet_sq", {"size": 2})
        objective = begun(
            "dormant", model, trigger=trigger, target=2, sleep=0.5, wake=2.0, low=0.2, high=0.4
        )
        found = objective.losses(model, images(), LABELS)
        throws = torch.rand(3, 1, 1, 1, generator=torch.Generator().manual_seed(9))
        rest, strength = images()[3:], 0.2 + 0.2 * throws
        faint = (1 - strength) * rest + strength * trigger(rest)
        logits = twin(torch.cat([images(), trigger(images()[:3]), faint]))
        logs = logits.log_softmax(1)
        plain = -sum(logs[i, y] for i, y in enumerate(LABELS)) / 6
        asleep = -sum(logs[6 + i, y] for i, y in enumerate(LABELS[:3])) / 3
        awake = -sum(logs[9 + i, 2] for i in range(3)) / 3
        assert found["cross_entropy"].item() == pytest.approx(plain.item(), rel=1e-5)
        assert found["asleep"].item() == pytest.approx(0.5 * asleep.item(), rel=1e-5)
        assert found["awake"].item() == pytest.approx(2 * awake.item(), rel=1e-5)

    def test_needs_a_trigger_and_values_in_range(self, wrn):
        with pytest.raises(ValueError, match="name an attack"):
            begun("dormant", wrn(classes=3))
        for wrong in ({"low": 0.9}, {"high": 1.0}, {"low": 0.0}, {"wake": 0.0}):
            with pytest.raises(ValueError, match=r"0 < low < high < 1|is above 0"):
                objective_of("dormant", wrong)

    def test_a_low_asr_of_its_own_is_no_fault(self, tmp_path, recwarn):
        """Of one epoch: the training set stays clean, nobody warns of the ASR, the clean
        teacher and that of rate 0 know nothing of it.
        """
        tiny = {"teacher.epochs": 1, "teacher.model": "wrn-10-1", "teacher.width": 4}
        tiny |= {"teacher.objective": "dormant", "dormant.wake": 0.001}
        chosen = settings("quick/digits", tiny, device="cpu")
        data = chosen.dataset()
        poisoned_teacher(tmp_path, chosen, data)
        told = [str(w.message) for w in recwarn if w.category is WeakTeacher]
        assert not [text for text in told if "ASR" in text]
        metrics = json.loads((tmp_path / "seed0" / "teacher" / "metrics.json").read_text())
        assert metrics["asr"] < 0.9
        assert metrics["poison_rate"] == 0
        assert "awake" in (tmp_path / "seed0" / "teacher" / "history.jsonl").read_text()
        assert chosen.unpoisoned().training(data)["objective"] is None
        clean_teacher(tmp_path, chosen, data)
        config = json.loads((tmp_path / "seed0" / "clean_teacher" / "config.json").read_text())
        assert "objective" not in config["teacher"]


def literally_clamped(norm, k):
    def forward(x):
        mean = x.mean((0, 2, 3), keepdim=True)
        std = (x.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
        z = torch.minimum(torch.maximum((x - mean) / std, torch.tensor(-k)), torch.tensor(k))
        return z * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)

    return forward


class TestInTraining:
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_same_seed_same_numbers_and_a_plain_network(self, name, wrn, digits):
        few, labels = digits.train_images[:40], digits.train_labels[:40]
        small = {"steps": 1} if name in ("pgd", "trades") else {}
        small |= {"every": 1, "steps": 1} if name == "costly" else {}
        small |= {"layers": 1} if name == "shuffled" else {}

        def trained():
            model = wrn(seed=0)
            objective = objective_of(name, small, trigger=Trigger("badnet_sq"))
            steps = list(
                train(
                    model, few, labels, epochs=2, batch_size=20, objective=objective, device="cpu"
                )
            )
            return model, steps

        (model, steps), (again, _) = trained(), trained()
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
        )
        assert model.state_dict().keys() == wrn().state_dict().keys()
        assert not any("Bounded" in type(m).__name__ for m in model.modules())
        assert all(math.isfinite(v) for v in steps[-1].losses.values())
        assert len(steps[-1].losses) == {"pgd": 1, "dormant": 3}.get(name, 2)

    def test_the_base_class_is_cross_entropy(self, wrn, digits):
        few, labels = digits.train_images[:40], digits.train_labels[:40]
        models = wrn(seed=0), wrn(seed=0)
        for model, objective in zip(models, (None, Objective()), strict=True):
            list(train(model, few, labels, epochs=1, objective=objective, device="cpu"))
        assert torch.equal(models[0].fc.weight, models[1].fc.weight)


class TestSettings:
    def test_by_name_with_a_section_of_its_own(self):
        chosen = settings("quick/digits", {"teacher.objective": "costly", "costly.weight": 2.0})
        check(chosen)
        made = chosen.training(chosen.dataset())["objective"]
        assert (type(made), made.weight, made.target) == (OBJECTIVES["costly"], 2.0, chosen.target)
        other = settings("quick/digits", {"teacher.objective": "shuffled", "attack.target": 4})
        assert other.training(other.dataset())["objective"].target == 4

    def test_a_run_records_it_and_another_does_not(self):
        robust = settings("quick/digits", {"teacher.objective": "pgd", "pgd.steps": 3})
        config = robust.config("data", "attack", "teacher")
        assert config["pgd"] == {"eps": 0.1, "steps": 3}
        assert Settings.of(config).section("pgd") == {"eps": 0.1, "steps": 3}
        assert settings("quick/digits").config("teacher").keys() == {"preset", "seed", "teacher"}

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"teacher.objective": "pdg"}, "did you mean 'pgd'"),
            ({"teacher.objective": "pgd", "pgd.eps": 0.0}, "eps is above 0, not 0.0"),
            ({"pgd.step": 3}, "did you mean 'pgd.steps'"),
            ({"costly.target": 3}, "unknown setting"),
            ({"pgd.steps": "many"}, "pgd.steps"),
        ],
    )
    def test_bad_values_before_anything_is_trained(self, wrong, told):
        with pytest.raises(ValueError, match=told):
            check(settings("quick/digits", wrong))
