"""One ZSKT pseudo-batch, and one with the Shuffling Vaccine, against the official loop's structure, in one process.

The naive side re-runs generator and teacher in every student step, with gradients everywhere, and the vaccine as k whole copies.
``make bench`` prints the ratios. They are figures of this machine, not a bound: only the losses are asserted.
"""

import copy
import os
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abdlab import ZSKT, ShufflingVaccine, build
from abdlab.distill import distill, seed_of
from abdlab.features import record
from abdlab.sources.zskt import attention

SIZES = {"digits quick: WRN-10-2 to 10-1, 1x16x16, batch 32": ("wrn-10-2", "wrn-10-1", (1, 16, 16), 32, 24, 3)}
SIZES["CIFAR: WRN-16-2 to 16-1, 3x32x32, batch 128"] = ("wrn-16-2", "wrn-16-1", (3, 32, 32), 128, 64, 5)


def naive_pseudo_batch(generator, teacher, student, noise, copies, clip=5.0):
    """The official structure; returns the generator's KL term and the mean KD loss."""
    adam_g, adam_s = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(student.parameters(), 2e-3)
    kds = []
    for i in range(11):
        images = generator(noise)
        with record(teacher, teacher.stages) as t, record(student, student.stages) as s:
            t_logits, s_logits = teacher(images), student(images)
        kd = F.kl_div(s_logits.log_softmax(1), t_logits.softmax(1), reduction="none").mean()
        if i == 0:
            first, loss, net, adam = -kd, -kd, generator, adam_g
            if copies:
                shuffled = torch.stack([c(images) for c in copies]).mean(0)
                agree = shuffled.argmax(1) == t_logits.argmax(1)
                term = F.kl_div(t_logits.log_softmax(1), shuffled.softmax(1), reduction="none").mean(1)
                loss = loss - 0.1 * (term * agree).sum() / agree.sum().clamp_min(1)
        else:
            at = sum((attention(s[n]) - attention(t[n])).square().mean() for n in teacher.stages)
            loss, net, adam = kd + 250 * at, student, adam_s
            kds.append(kd.item())
        generator.zero_grad(), student.zero_grad(), teacher.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        adam.step()
    return first.item(), sum(kds) / len(kds)


@pytest.mark.benchmark
@pytest.mark.parametrize("vaccine", [False, True], ids=["plain", "SV"])
@pytest.mark.parametrize("size", SIZES)
def test_pseudo_batch(size, vaccine):
    torch.set_num_threads(os.cpu_count() or 1)
    t_name, s_name, shape, batch, width, layers = SIZES[size]
    teacher, student = (build(n, channels=shape[0], seed=i) for i, n in enumerate((t_name, s_name)))
    teacher.eval()
    settings = {"pseudo_batches": 4, "batch_size": batch, "width": width}
    twin, other = ZSKT(shape, **settings), copy.deepcopy(student).train()
    twin.start(teacher, other, torch.device("cpu"), seed_of(0, "source", "zskt"))
    sv = ShufflingVaccine(layers=layers, warmup=0, verify=False)
    stream = distill(teacher, student, ZSKT(shape, **settings), defenses=[sv] if vaccine else [], device="cpu")
    ours, theirs, steps = [], [], []
    naive_teacher = copy.deepcopy(teacher).requires_grad_(True)
    for _ in range(3):
        began = time.perf_counter()
        steps.append(next(stream))
        ours.append(time.perf_counter() - began)
        copies = []
        if vaccine:
            copies = [copy.deepcopy(naive_teacher) for _ in range(sv.k)]
            for j, clone in enumerate(copies):
                clone.load_state_dict({**clone.state_dict(), **sv.vaccine.weights(j)})
        noise = torch.randn(batch, 100, generator=twin.rng)
        began = time.perf_counter()
        first, kd = naive_pseudo_batch(twin.generator, naive_teacher, other, noise, copies)
        theirs.append(time.perf_counter() - began)
        if len(steps) == 1:
            assert steps[0].losses["generator"] == pytest.approx(first, rel=1e-4)
            assert steps[0].losses["kd"] == pytest.approx(kd, rel=1e-2)
    naive, fast = min(theirs), min(ours)
    print(f"\n{size}, {'SV' if vaccine else 'plain'}: naive {naive:.2f} s, ours {fast:.2f} s, {naive / fast:.2f}x faster")
