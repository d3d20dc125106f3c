"""The naive side of every comparison: the official code's structure, in whole-batch
torch operations.

tests/literal.py writes the same formulas as loops over samples, which would make this
side artificially slow; only its deep copies for shuffled teachers are taken from there.
What is not skipped here, as in the official loop: every network takes gradients, also
where nobody uses them; generator and teacher run anew in every student step; shuffled
teachers are whole copies; SR recomputes the clean answer in every inner step. The
networks, and each random number, are those of the side that it is compared with.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from abdlab.data import augment, random_views
from abdlab.features import mode, record
from abdlab.losses import attention
from abdlab.sources.pooled import latest


def kl(p_logits, q_logits, temperature=1.0):
    """(B,): KL(p || q) per sample, summed over classes."""
    logs = [(logits / temperature).log_softmax(1) for logits in (q_logits, p_logits)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(1)


def forget_gradients(*networks):
    for network in networks:
        network.zero_grad()


class NaiveZSKT:
    """ZSKT's loop.

    Args:
        source: a started :class:`abdlab.ZSKT`, whose generator and noise are used.
        teacher, student: as they are when it starts; both, and the generator, take
            gradients.

    ``copies`` are the vaccine's shuffled teachers; none is without a vaccine.
    """

    def __init__(self, source, teacher, student, attention=250.0, clip=5.0):
        self.source, self.generator, self.teacher, self.student = (
            source,
            source.generator,
            teacher,
            student,
        )
        self.attention, self.clip, self.copies = attention, clip, []
        self.adam_g, self.adam_s = (
            Adam(self.generator.parameters(), 1e-3),
            Adam(student.parameters(), 2e-3),
        )

    def pass_through(self, noise):
        """(images, teacher's logits, KD loss, attention loss), all attached to every
        network.
        """
        images = self.generator(noise)
        with (
            record(self.teacher, self.teacher.stages) as t,
            record(self.student, self.student.stages) as s,
        ):
            t_logits, s_logits = self.teacher(images), self.student(images)
        gaps = [(attention(s[n]) - attention(t[n])).square().mean() for n in self.teacher.stages]
        return (
            images,
            t_logits,
            (kl(t_logits, s_logits) / t_logits.shape[1]).mean(),
            self.attention * sum(gaps),
        )

    def step(self, loss, network, adam, more=()):
        """One step of one network; ``more`` are gradients that join those of the loss."""
        forget_gradients(self.generator, self.teacher, self.student)
        loss.backward()
        for p, gradient in zip(network.parameters(), more, strict=False):
            p.grad += gradient
        nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        adam.step()

    def generator_step(self, noise, alpha=0.1):
        images, t_logits, kd, _ = self.pass_through(noise)
        loss, losses = -kd, {"generator": -kd.item()}
        if self.copies:
            shuffled = torch.stack([copy(images) for copy in self.copies]).mean(0)
            agree = shuffled.argmax(1) == t_logits.argmax(1)
            term = (
                -alpha
                * (kl(shuffled, t_logits) / t_logits.shape[1] * agree).sum()
                / agree.sum().clamp_min(1)
            )
            loss, losses["sv_synthesis"] = loss + term, term.item()
        self.step(loss, self.generator, self.adam_g)
        return losses

    def student_step(self, noise, sr=None):
        """``sr`` returns (value, gradients of the student's weights) on images, see
        :func:`self_retrospection`.
        """
        images, _, kd, gaps = self.pass_through(noise)
        value, gradients = sr(images.detach()) if sr else (kd.new_zeros(()), ())
        self.step(kd + gaps, self.student, self.adam_s, gradients)
        return {"kd": kd.item(), "attention": gaps.item(), "sr": value.item()}

    def pseudo_batch(self, steps=10):
        """The mean losses of one generator step and ``steps`` student steps on the same
        noise.
        """
        noise = self.source.noise()
        losses = self.generator_step(noise)
        rows = [self.student_step(noise) for _ in range(steps)]
        return losses | {
            name: sum(row[name] for row in rows) / steps for name in ("kd", "attention")
        }


def self_retrospection(
    student,
    victim,
    images,
    start,
    scale,
    order=2,
    steps=10,
    lr=0.1,
    penalty=1e-3,
    iterations=5,
    fixed=0.1,
):
    """SR's term and its gradients for the student's weights.

    Args:
        victim: whose answer delta changes, the teacher in the official sweeps. start:
            delta's start, (1, C, H, W) in normalised units.
        scale: (1, C, 1, 1), from there to pixels.
        order: 2 adds the gradient through delta, by ``iterations`` fixed-point
            iterations of step ``fixed``.
    """
    weights, delta = list(student.parameters()), start.clone().requires_grad_()

    def inner():
        return (
            penalty * delta.square().sum()
            - kl(victim(images), victim(images + delta * scale)).mean()
        )

    adam = Adam([delta], lr=lr)
    for _ in range(steps):
        adam.zero_grad(), forget_gradients(victim)
        inner().backward()
        adam.step()
    outer = kl(student(images), student(images + delta * scale)).mean()
    outer_slope, *gradients = torch.autograd.grad(outer, [delta, *weights])
    if order == 2:
        (slope,) = torch.autograd.grad(inner(), [delta], create_graph=True)
        mapped, v = delta - fixed * slope, torch.zeros_like(delta)
        for _ in range(iterations):
            v = (
                torch.autograd.grad(mapped, [delta], grad_outputs=v, retain_graph=True)[0]
                + outer_slope
            )
        through = torch.autograd.grad(mapped, weights, grad_outputs=v, allow_unused=True)
        gradients = [g if t is None else g + t for g, t in zip(gradients, through, strict=True)]
    return outer.detach(), gradients


class NaivePool:
    """What :class:`abdlab.sources.pooled.Pooled` sources share, with gradients everywhere;
    ``source`` is a started one, whose random numbers and pool are used. Images of the pool
    are not read back from files, as in the official codes.
    """

    def __init__(self, source, teacher, student):
        self.source, self.teacher, self.student = source, teacher, student
        self.sgd = SGD(
            student.parameters(),
            lr=source.lr,
            momentum=source.momentum,
            weight_decay=source.weight_decay,
        )
        self.norms = [
            name for name, module in teacher.named_modules() if isinstance(module, nn.BatchNorm2d)
        ]

    def look(self, view):
        """(teacher's logits, the inputs of its batch norms)."""
        with record(self.teacher, self.norms, inputs=True) as inputs:
            logits = self.teacher(view)
        return logits, inputs

    def off(self, name, mean, variance):
        """How far statistics are from those that a batch norm remembers."""
        module = self.teacher.get_submodule(name)
        return (mean - module.running_mean).norm() + (variance - module.running_var).norm()

    def disagreement(self, view, logits):
        """Mean KL(T || S) where both predict the same class."""
        with mode(self.student, training=False):
            answer = self.student(view)
        return (kl(logits, answer) * (answer.argmax(1) == logits.argmax(1))).mean()

    def keep(self, images):
        """A round's images into the pool."""
        s = self.source
        s.pool = latest(s.pool, images.clamp(0, 1).mul(255).round().to(torch.uint8), s.pool_size)

    def kd_step(self):
        s = self.source
        images = augment(s._sample(), s.shift, s.flip, s.rng)
        loss = (
            s.temperature**2 * kl(self.teacher(images), self.student(images), s.temperature).mean()
        )
        forget_gradients(self.teacher, self.student)
        loss.backward()
        self.sgd.step()
        return {"kd": loss.item()}


class NaiveFast(NaivePool):
    """Rounds of FastDFKD and NAYER, as their official codes make them."""

    def terms(self, images, targets):
        s, now, distance = self.source, {}, 0
        view = random_views(images, s.rng, shift=s.shift, flip=s.flip)
        logits, inputs = self.look(view)
        for name, x in inputs.items():
            now[name] = mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if name in s.past:
                share = s.momentum_bn
                mean, variance = (
                    share * old + (1 - share) * new
                    for old, new in zip(s.past[name], now[name], strict=True)
                )
            distance = distance + self.off(name, mean, variance)
        losses = {
            "batch_norm": s.batch_norm * distance,
            "one_hot": s.one_hot * F.cross_entropy(logits, targets),
        }
        if s.rounds_made >= s.warmup:
            losses["adversarial"] = -s.adversarial * self.disagreement(view, logits)
        return losses, now

    def synthesis(self):
        """One round's images into the pool; the losses of the batch that was kept."""
        s = self.source
        maker, (ours,) = s.begin()
        groups = [{"params": g["params"], "lr": g["lr"]} for g in ours.param_groups]
        adam = Adam(groups, betas=(0.5, 0.999))
        targets, lowest = s.targets(), float("inf")
        for _ in range(s.synthesis_steps):
            images = maker()
            losses, s.now = self.terms(images, targets)
            total = sum(losses.values())
            if total.item() < lowest:
                lowest, kept = total.item(), images.detach()
                best = {name: value.item() for name, value in losses.items()}
            forget_gradients(maker, self.teacher, self.student)
            total.backward()
            adam.step()
            s.gather(maker)
        self.keep(kept)
        s.remember(None)
        s.rounds_made += 1
        s._shuffle()
        return best


class NaiveCMI(NaivePool):
    """CMI's rounds. As in the official code the generator runs once per step."""

    def __init__(self, source, teacher, student):
        super().__init__(source, teacher, student)
        self.adam_head = Adam(source.head.parameters(), lr=source.generator_lr)

    def terms(self, images, targets):
        s = self.source
        view = random_views(images, s.rng, shift=s.shift, flip=s.flip)
        logits, inputs = self.look(view)
        distance = 0
        for name, x in inputs.items():
            distance = distance + self.off(name, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        disagreement = self.disagreement(view, logits)
        local_inputs = self.look(
            random_views(images, s.rng, scale=s.crop, ratio=(3 / 4, 4 / 3), flip=s.flip)
        )[1]
        local, whole = (
            torch.cat([x.mean((2, 3)) for x in found.values()], 1)
            for found in (local_inputs, inputs)
        )
        past = s.bank[torch.randperm(len(s.bank), generator=s.rng)[: s.negatives].to(view.device)]
        wholes, locals_ = (
            F.normalize(s.head(torch.cat([new, past[:, i]])), dim=1, eps=1e-6)
            for new, i in ((whole.detach(), 1), (local, 0))
        )
        similar = locals_ @ wholes.detach().T / s.contrast
        each = F.cross_entropy(
            similar, torch.arange(len(similar), device=view.device), reduction="none"
        )
        new, old = each.split([len(local), len(past)])
        losses = {
            "batch_norm": s.batch_norm * distance,
            "one_hot": s.one_hot * F.cross_entropy(logits, targets),
            "adversarial": -s.adversarial * disagreement,
            "contrastive": s.contrastive * (new.mean() + old.mean() if len(old) else new.mean()),
        }
        return losses, torch.stack([local, whole], 1).detach()

    def synthesis(self):
        """One round's images into the pool; the losses of the batch that was kept."""
        s = self.source
        maker, _ = s.begin()
        adam = Adam([*maker.generator.parameters(), maker.z], lr=s.generator_lr, betas=(0.5, 0.999))
        targets = torch.randint(s.classes, (s.synthesis_batch,), generator=s.rng).to(s.device)
        lowest = float("inf")
        for _ in range(s.synthesis_steps):
            images = maker()
            losses, features = self.terms(images, targets)
            total = sum(losses.values())
            if total.item() < lowest:
                lowest, kept, remembered = total.item(), images.detach(), features
                best = {name: value.item() for name, value in losses.items()}
            forget_gradients(maker, self.teacher, self.student)
            total.backward()
            adam.step(), self.adam_head.step()
        self.keep(kept)
        s.remember(remembered)
        s._shuffle()
        return best


def ood_step(source, teacher, student, adam):
    """One student step on patches, mixed as a started :class:`abdlab.OOD` without a
    teacher does.
    """
    images = source.batch().images
    logits = teacher(images)
    loss = (kl(logits, student(images), source.temperature) / logits.shape[1]).mean()
    forget_gradients(teacher, student)
    loss.backward()
    adam.step()
    return {"kd": loss.item()}


class BoundedNorm(nn.BatchNorm2d):
    """A batch norm in evaluation, bounded by the formula: normalise, clamp, scale, shift."""

    def forward(self, x):
        mean, variance, weight, bias = (
            v.view(1, -1, 1, 1)
            for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        z = (x - mean) / (variance + self.eps).sqrt()
        return z.clamp(-self.reach, self.reach) * weight + bias


def bounded(model, k):
    """A copy, every batch norm of which is bounded to k standard deviations."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.__class__, m.reach = BoundedNorm, k
    return model


def unlearn_step(teacher, model, adam, images, others, triggered):
    """One step of unlearning: the teacher answers both halves anew, each half has a pass
    of its own. Returns the loss.
    """
    kept = kl(teacher(images).detach(), model(images)).mean()
    changed = kl(teacher(others).detach(), model(triggered)).mean()
    loss = kept + changed
    adam.zero_grad()
    loss.backward()
    adam.step()
    return loss.item()


def teacher_epochs(model, images, labels, *, epochs, batch_size, shift, flip, seed=0):
    """Supervised training image by image, as a loader with transforms does it; yields
    the mean cross-entropy of each epoch.
    """
    sgd = SGD(model.train().parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rate = CosineAnnealingLR(sgd, epochs * (len(images) // batch_size))
    rng, (height, width) = torch.Generator().manual_seed(seed), images.shape[-2:]
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(images), generator=rng).split(batch_size):
            offsets = torch.randint(0, 2 * shift + 1, (2, len(chosen)), generator=rng).T.tolist()
            mirrored = (
                (torch.rand(len(chosen), generator=rng) < 0.5).tolist()
                if flip
                else [False] * len(chosen)
            )
            pictures = []
            for index, (y, x), mirror in zip(chosen.tolist(), offsets, mirrored, strict=True):
                picture = F.pad(images[index], [shift] * 4)[:, y : y + height, x : x + width]
                pictures.append(picture.flip(-1) if mirror else picture)
            loss = F.cross_entropy(model(torch.stack(pictures)), labels[chosen.to(labels.device)])
            sgd.zero_grad()
            loss.backward()
            sgd.step(), rate.step()
            losses.append(loss.item())
        yield {"cross_entropy": sum(losses) / len(losses)}
