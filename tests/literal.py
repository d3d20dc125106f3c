"""The formulas of the paper (Hong et al., ICML 2023, arXiv 2306.02368) written out naively: the oracle of every fast path.

Nothing here comes from abdlab. Sums are loops over samples, classes and pixels, shuffled teachers are deep copies,
optimisers are written by hand, derivatives of derivatives are explicit matrices. Slow, and meant to be.
"""

import copy
import math
import statistics

import torch
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call


def probabilities(logits, temperature=1.0):
    """Softmax of one sample's logits: exp(l_c / T) / sum_j exp(l_j / T)."""
    powers = [(value / temperature).exp() for value in logits]
    return [power / sum(powers) for power in powers]


def kl(p_logits, q_logits, temperature=1.0):
    """KL(p || q) of one sample: sum over classes of p_c (log p_c - log q_c)."""
    p, q = probabilities(p_logits, temperature), probabilities(q_logits, temperature)
    return sum(p_c * (p_c.log() - q_c.log()) for p_c, q_c in zip(p, q, strict=True))


def mean_kl(p_logits, q_logits, temperature=1.0):
    """Mean over the batch of KL(p || q), summed over classes."""
    return sum(kl(p, q, temperature) for p, q in zip(p_logits, q_logits, strict=True)) / len(p_logits)


def zskt_kd(teacher_logits, student_logits, temperature=1.0):
    """ZSKT's KD loss: KL(T || S), mean over batch and classes, no factor T^2."""
    return mean_kl(teacher_logits, student_logits, temperature) / len(teacher_logits[0])


def zskt_generator(teacher_logits, student_logits, temperature=1.0):
    """ZSKT's generator maximises KL(T || S), mean over batch and classes."""
    return -zskt_kd(teacher_logits, student_logits, temperature)


def attention_map(feature):
    """One sample's (C, H, W): the mean over channels of squares at each position, then divided by the l2 norm; a list."""
    channels, height, width = feature.shape
    energy = [sum(feature[c, y, x] ** 2 for c in range(channels)) / channels for y in range(height) for x in range(width)]
    norm = sum(e**2 for e in energy).sqrt()
    return [e / norm for e in energy]


def attention_transfer(student_feature, teacher_feature):
    """Mean over the batch of ||a_S - a_T||^2 averaged over positions, for one pair of layers (B, C, H, W)."""
    total = 0
    for s, t in zip(student_feature, teacher_feature, strict=True):
        a_s, a_t = attention_map(s), attention_map(t)
        total = total + sum((u - v) ** 2 for u, v in zip(a_s, a_t, strict=True)) / len(a_s)
    return total / len(student_feature)


def clean_kd(teacher_logits, student_logits, labels, temperature=6.0, alpha=0.95):
    """Hinton: alpha T^2 KL(T || S at temperature T), mean over the batch, + (1 - alpha) cross-entropy with the labels."""
    hard = -sum(probabilities(logits)[label].log() for logits, label in zip(student_logits, labels, strict=True)) / len(labels)
    return alpha * temperature**2 * mean_kl(teacher_logits, student_logits, temperature) + (1 - alpha) * hard


def shuffled_teachers(teacher, permutations):
    """Deep copies of the teacher, each with the input channels of the named convolutions' kernels permuted.

    ``permutations`` maps a convolution's name to one order of its kernel's input channels per copy.
    """
    copies = []
    for j in range(len(next(iter(permutations.values())))):
        other = copy.deepcopy(teacher)
        for name, orders in permutations.items():
            weight, original = other.get_submodule(name).weight, teacher.get_submodule(name).weight
            with torch.no_grad():
                for position, channel in enumerate(orders[j].tolist()):
                    weight[:, position] = original[:, channel]
        copies.append(other)
    return copies


def shuffled_teacher(copies, images):
    """T~: the mean of the copies' logits."""
    return sum(other(images) for other in copies) / len(copies)


def synthesis_term(shuffled_logits, teacher_logits, alpha, per):
    """SV's part of the generator's loss: -alpha x mean of KL(T~ || T) over samples on which both predict the same class.

    KL is the mean over classes. ``per`` is the divisor: the number of "agreeing" samples (official code) or the "batch".
    """
    total, agreeing = torch.zeros(()), 0
    for s, t in zip(shuffled_logits, teacher_logits, strict=True):
        if s.argmax() == t.argmax():
            agreeing += 1
            total = total + kl(s, t) / len(t)
    count = agreeing if per == "agreeing" else len(teacher_logits)
    return -alpha * total / max(count, 1)


def suspicion(shuffled_logits, teacher_logits, floor=1e-12):
    """log10 KL(T~ || T) of each sample, in float64; what round-off leaves under ``floor`` counts as ``floor``. A list."""
    values = [kl(s, t).item() for s, t in zip(shuffled_logits.double(), teacher_logits.double(), strict=True)]
    return [math.log10(max(value, floor)) for value in values]


def tail_share(scores, sigma=3.0):
    """Share of the scores below mean - sigma x std (of the scores themselves: divided by their number)."""
    line = statistics.fmean(scores) - sigma * statistics.pstdev(scores)
    return sum(score < line for score in scores) / len(scores)


class Adam:
    """Kingma & Ba's Adam, written out."""

    def __init__(self, parameters):
        self.parameters, self.step_number = list(parameters), 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, gradients, lr):
        self.step_number += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
            m, v = self.m[i] / (1 - 0.9**self.step_number), self.v[i] / (1 - 0.999**self.step_number)
            with torch.no_grad():
                p -= lr * m / (v.sqrt() + 1e-8)


def clipped(gradients, norm):
    """Gradients scaled together so that their l2 norm is at most ``norm``."""
    total = math.sqrt(sum((g**2).sum().item() for g in gradients))
    return [g * min(1.0, norm / (total + 1e-6)) for g in gradients]


def cosine(lr, step, total):
    """Cosine annealing from lr to 0: the rate of step 0, 1, ..., total - 1."""
    return lr * (1 + math.cos(math.pi * step / total)) / 2


def inner_loss(model, images, delta, scale, penalty):
    """What SR's delta minimises: -mean KL(M(x) || M(x + delta)) + penalty ||delta||^2, delta in normalised units."""
    return penalty * (delta**2).sum() - mean_kl(model(images), model(images + delta * scale))


def universal_delta(model, images, start, scale, steps, lr, penalty):
    """SR's universal perturbation: Adam steps on :func:`inner_loss` from ``start``, one delta for the whole batch."""
    delta = start.clone().requires_grad_()
    adam = Adam([delta])
    for _ in range(steps):
        adam.step(torch.autograd.grad(inner_loss(model, images, delta, scale, penalty), [delta]), lr)
    return delta.detach()


def self_retrospection(student, images, delta, scale):
    """SR's term: mean KL(S(x) || S(x + delta)). Differentiated with delta held fixed, it gives the order-1 gradient."""
    return mean_kl(student(images), student(images + delta * scale))


def implicit_gradient(student, images, delta, scale, penalty, step, iterations):
    """SR's implicit term: what reaches the student's weights w through delta, as one flat vector.

    delta is a fixed point of Phi(delta, w) = delta - step x d inner / d delta. The fixed-point iteration for
    (I - dPhi/ddelta)^T v = d outer / d delta starts from v = 0 and is v <- (dPhi/ddelta)^T v + d outer / d delta;
    the term is (dPhi/dw)^T v. Here dPhi/ddelta and dPhi/dw are whole matrices.
    """
    named = dict(student.named_parameters())
    shapes, flat = {n: p.shape for n, p in named.items()}, torch.cat([p.detach().reshape(-1) for p in named.values()])
    point = delta.detach().reshape(-1)

    def model(w):
        parts = w.split([shape.numel() for shape in shapes.values()])
        weights = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}

        def forward(x):
            buffers = {n: b.clone() for n, b in student.named_buffers()}
            return functional_call(student, {**weights, **buffers}, (x,))

        return forward

    def inner(d, w):
        return inner_loss(model(w), images, d.view_as(delta), scale, penalty)

    def inner_slope(w):
        d = point.clone().requires_grad_()
        return torch.autograd.grad(inner(d, w), [d], create_graph=True)[0]

    d = point.clone().requires_grad_()
    outer_slope = torch.autograd.grad(self_retrospection(model(flat), images, d.view_as(delta), scale), [d])[0]
    phi_delta = torch.eye(len(point)) - step * hessian(lambda d: inner(d, flat), point)
    phi_weights = -step * jacobian(inner_slope, flat)
    v = torch.zeros_like(point)
    for _ in range(iterations):
        v = phi_delta.T @ v + outer_slope
    return phi_weights.T @ v


def features(model, images, names):
    """(logits, {layer name: its output}) of one pass."""
    found, handles = {}, []
    for name in names:
        keep = lambda module, args, output, name=name: found.__setitem__(name, output)  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, found


def pseudo_batch(
    generator,
    teacher,
    student,
    noise,
    *,
    student_steps,
    total_student_steps,
    generator_lr,
    student_lr,
    clip,
    temperature=1.0,
    attention=250.0,
    stages=(),
    copies=None,
    alpha=0.1,
    per="agreeing",
    starts=None,
    scale=None,
    inner_steps=10,
    inner_lr=0.1,
    penalty=1e-3,
    weight=1.0,
):
    """The first pseudo-batch of ZSKT as the official loop runs it; the networks are changed in place.

    Generator and teacher run anew for the generator step and for each student step, and everything carries gradients
    everywhere. With ``copies`` the generator's loss has SV's term; with ``starts`` (one delta per student step) the
    student's has SR's, first order, against the student.

    Returns:
        the mean of each loss term over the steps that have it.
    """
    adam_g, adam_s = Adam(generator.parameters()), Adam(student.parameters())
    losses = {}

    def slopes(loss, wanted, other):
        loss.backward()
        found = [p.grad.clone() for p in wanted.parameters()]
        wanted.zero_grad(), other.zero_grad()
        return found

    def note(name, value):
        losses.setdefault(name, []).append(value.item())
        return value

    for i in range(1 + student_steps):
        images = generator(noise)
        t_logits, t_features = features(teacher, images, stages)
        s_logits, s_features = features(student, images, stages)
        if i == 0:
            loss = note("generator", zskt_generator(t_logits, s_logits, temperature))
            if copies:
                loss = loss + note("sv_synthesis", synthesis_term(shuffled_teacher(copies, images), t_logits, alpha, per))
            adam_g.step(clipped(slopes(loss, generator, student), clip), generator_lr)
            continue
        loss = note("kd", zskt_kd(t_logits, s_logits, temperature))
        if stages:
            loss = loss + note("attention", attention * sum(attention_transfer(s_features[n], t_features[n]) for n in stages))
        if starts is not None:
            delta = universal_delta(student, images, starts[i - 1], scale, inner_steps, inner_lr, penalty)
            loss = loss + note("sr", weight * self_retrospection(student, images, delta, scale))
        adam_s.step(clipped(slopes(loss, student, generator), clip), cosine(student_lr, i - 1, total_student_steps))
    return {name: statistics.fmean(values) for name, values in losses.items()}
