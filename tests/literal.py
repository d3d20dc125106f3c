"""The formulas of the paper (Hong et al., ICML 2023, arXiv 2306.02368) written out
naively: the oracle of every fast path.

Nothing here comes from abdlab. Sums are loops over samples, classes and pixels,
shuffled teachers are deep copies, optimisers are written by hand, derivatives of
derivatives are explicit matrices. Slow, and meant to be.
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
    return sum(kl(p, q, temperature) for p, q in zip(p_logits, q_logits, strict=True)) / len(
        p_logits
    )


def zskt_kd(teacher_logits, student_logits, temperature=1.0):
    """ZSKT's KD loss: KL(T || S), mean over batch and classes, no factor T^2."""
    return mean_kl(teacher_logits, student_logits, temperature) / len(teacher_logits[0])


def zskt_generator(teacher_logits, student_logits, temperature=1.0):
    """ZSKT's generator maximises KL(T || S), mean over batch and classes."""
    return -zskt_kd(teacher_logits, student_logits, temperature)


def attention_map(feature):
    """One sample's (C, H, W): the mean over channels of squares at each position, then
    divided by the l2 norm; a list.
    """
    channels, height, width = feature.shape
    energy = [
        sum(feature[c, y, x] ** 2 for c in range(channels)) / channels
        for y in range(height)
        for x in range(width)
    ]
    norm = sum(e**2 for e in energy).sqrt()
    return [e / norm for e in energy]


def attention_transfer(student_feature, teacher_feature):
    """Mean over the batch of ||a_S - a_T||^2 averaged over positions, for one pair of
    layers (B, C, H, W).
    """
    total = 0
    for s, t in zip(student_feature, teacher_feature, strict=True):
        a_s, a_t = attention_map(s), attention_map(t)
        total = total + sum((u - v) ** 2 for u, v in zip(a_s, a_t, strict=True)) / len(a_s)
    return total / len(student_feature)


def clean_kd(teacher_logits, student_logits, labels, temperature=6.0, alpha=0.95):
    """Hinton: alpha T^2 KL(T || S at temperature T), mean over the batch, + (1 - alpha)
    cross-entropy with the labels.
    """
    hard = -sum(
        probabilities(logits)[label].log()
        for logits, label in zip(student_logits, labels, strict=True)
    ) / len(labels)
    return (
        alpha * temperature**2 * mean_kl(teacher_logits, student_logits, temperature)
        + (1 - alpha) * hard
    )


def shuffled_teachers(teacher, permutations):
    """Deep copies of the teacher, each with the input channels of the named
    convolutions' kernels permuted.

    ``permutations`` maps a convolution's name to one order of its kernel's input
    channels per copy.
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


def synthesis_term(shuffled_logits, teacher_logits, alpha, per, class_mean=True):
    """SV's part of the generator's loss: -alpha x mean of KL(T~ || T) over samples on
    which both predict the same class.

    KL is the mean over classes, or their sum. ``per`` is the divisor: the number of
    "agreeing" samples (official code) or the "batch".
    """
    total, agreeing = torch.zeros(()), 0
    for s, t in zip(shuffled_logits, teacher_logits, strict=True):
        if s.argmax() == t.argmax():
            agreeing += 1
            total = total + kl(s, t) / (len(t) if class_mean else 1)
    count = agreeing if per == "agreeing" else len(teacher_logits)
    return -alpha * total / max(count, 1)


def weighted_kd(losses, suspicious, alpha):
    """SV where nothing is synthesised, as printed: mean of the samples' losses times 1
    - phi + phi / alpha.
    """
    return sum(
        loss * (1 - phi + phi / alpha) for loss, phi in zip(losses, suspicious, strict=True)
    ) / len(losses)


def ascended_kd(losses, suspicious, alpha):
    """The same in the official code: mean over the others - alpha x mean over the
    suspicious; the mean of none is 0.
    """
    others = [loss for loss, phi in zip(losses, suspicious, strict=True) if not phi]
    marked = [loss for loss, phi in zip(losses, suspicious, strict=True) if phi]
    return sum(others) / max(len(others), 1) - alpha * sum(marked) / max(len(marked), 1)


def suspicion(shuffled_logits, teacher_logits, floor=1e-12):
    """log10 KL(T~ || T) of each sample, in float64; what round-off leaves under
    ``floor`` counts as ``floor``. A list.
    """
    values = [
        kl(s, t).item()
        for s, t in zip(shuffled_logits.double(), teacher_logits.double(), strict=True)
    ]
    return [math.log10(max(value, floor)) for value in values]


def tail_share(scores, sigma=3.0):
    """Share of the scores below mean - sigma x std (of the scores themselves: divided
    by their number).
    """
    line = statistics.fmean(scores) - sigma * statistics.pstdev(scores)
    return sum(score < line for score in scores) / len(scores)


class Adam:
    """Kingma & Ba's Adam, written out."""

    def __init__(self, parameters, betas=(0.9, 0.999)):
        self.parameters, self.step_number, self.betas = list(parameters), 0, betas
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, gradients, lr):
        self.step_number += 1
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            first, second = self.betas
            self.m[i] = first * self.m[i] + (1 - first) * g
            self.v[i] = second * self.v[i] + (1 - second) * g**2
            m, v = (
                self.m[i] / (1 - first**self.step_number),
                self.v[i] / (1 - second**self.step_number),
            )
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
    """What SR's delta minimises: -mean KL(M(x) || M(x + delta)) + penalty ||delta||^2,
    delta in normalised units.
    """
    return penalty * (delta**2).sum() - mean_kl(model(images), model(images + delta * scale))


def universal_delta(model, images, start, scale, steps, lr, penalty):
    """SR's universal perturbation: Adam steps on :func:`inner_loss` from ``start``, one
    delta for the whole batch.
    """
    delta = start.clone().requires_grad_()
    adam = Adam([delta])
    for _ in range(steps):
        adam.step(
            torch.autograd.grad(inner_loss(model, images, delta, scale, penalty), [delta]), lr
        )
    return delta.detach()


def inverted_trigger(model, images, target, mask, pattern, steps, lr, penalty):
    """Neural Cleanse: the mask and pattern, sigmoids of what Adam moves, that call
    ``target`` with the smallest mask.
    """
    mask, pattern = mask.clone().requires_grad_(), pattern.clone().requires_grad_()
    adam = Adam([mask, pattern])
    for _ in range(steps):
        m, p = torch.sigmoid(mask), torch.sigmoid(pattern)
        log_probabilities = torch.log_softmax(model(images + m * (p - images)), 1)
        loss = -sum(row[target] for row in log_probabilities) / len(images) + penalty * m.sum()
        adam.step(torch.autograd.grad(loss, [mask, pattern]), lr)
    return torch.sigmoid(mask).detach(), torch.sigmoid(pattern).detach(), loss.item()


def self_retrospection(student, images, delta, scale):
    """SR's term: mean KL(S(x) || S(x + delta)). Differentiated with delta held fixed,
    it gives the order-1 gradient.
    """
    return mean_kl(student(images), student(images + delta * scale))


def implicit_gradient(student, images, delta, scale, penalty, step, iterations):
    """SR's implicit term: what reaches the student's weights w through delta, as one
    flat vector.

    delta is a fixed point of Phi(delta, w) = delta - step x d inner / d delta. The
    fixed-point iteration for (I - dPhi/ddelta)^T v = d outer / d delta starts from v =
    0 and is v <- (dPhi/ddelta)^T v + d outer / d delta; the term is (dPhi/dw)^T v. Here
    dPhi/ddelta and dPhi/dw are whole matrices.
    """
    named = dict(student.named_parameters())
    shapes, flat = (
        {n: p.shape for n, p in named.items()},
        torch.cat([p.detach().reshape(-1) for p in named.values()]),
    )
    point = delta.detach().reshape(-1)

    def model(w):
        parts = w.split([shape.numel() for shape in shapes.values()])
        weights = {
            n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)
        }

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
    outer_slope = torch.autograd.grad(
        self_retrospection(model(flat), images, d.view_as(delta), scale), [d]
    )[0]
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
    """The first pseudo-batch of ZSKT as the official loop runs it; the networks are
    changed in place.

    Generator and teacher run anew for the generator step and for each student step, and
    everything carries gradients everywhere. With ``copies`` the generator's loss has
    SV's term; with ``starts`` (one delta per student step) the student's has SR's,
    first order, against the student.

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
                loss = loss + note(
                    "sv_synthesis",
                    synthesis_term(shuffled_teacher(copies, images), t_logits, alpha, per),
                )
            adam_g.step(clipped(slopes(loss, generator, student), clip), generator_lr)
            continue
        loss = note("kd", zskt_kd(t_logits, s_logits, temperature))
        if stages:
            loss = loss + note(
                "attention",
                attention * sum(attention_transfer(s_features[n], t_features[n]) for n in stages),
            )
        if starts is not None:
            delta = universal_delta(
                student, images, starts[i - 1], scale, inner_steps, inner_lr, penalty
            )
            loss = loss + note("sr", weight * self_retrospection(student, images, delta, scale))
        adam_s.step(
            clipped(slopes(loss, student, generator), clip),
            cosine(student_lr, i - 1, total_student_steps),
        )
    return {name: statistics.fmean(values) for name, values in losses.items()}


class SGD:
    """Stochastic gradient descent with momentum and an l2 penalty in the gradient,
    written out.
    """

    def __init__(self, parameters, momentum, weight_decay, nesterov=False):
        self.parameters, self.momentum, self.weight_decay, self.nesterov = (
            list(parameters),
            momentum,
            weight_decay,
            nesterov,
        )
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    def step(self, gradients, lr):
        for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
            with torch.no_grad():
                g = g + self.weight_decay * p
                self.velocity[i] = self.momentum * self.velocity[i] + g
                p -= lr * (
                    g + self.momentum * self.velocity[i] if self.nesterov else self.velocity[i]
                )


def entropy(p):
    """-sum of p_c log p_c in nats, over a list of probabilities."""
    return -sum(p_c * p_c.log() for p_c in p)


def instance_entropy(logits):
    """DFQ: the mean over the batch of each prediction's entropy."""
    return sum(entropy(probabilities(sample)) for sample in logits) / len(logits)


def batch_entropy(logits):
    """DAFL, DFQ: the entropy, in nats, of the mean over the batch of the predictions."""
    each = [probabilities(sample) for sample in logits]
    return entropy([sum(p[c] for p in each) / len(each) for c in range(len(each[0]))])


def own_prediction(logits):
    """DAFL: the mean over the batch of the cross-entropy with the class that the logits
    themselves call.
    """
    return -sum(probabilities(sample)[sample.argmax()].log() for sample in logits) / len(logits)


def batch_norm_distance(layers):
    """DeepInversion: the sum over layers of ||mean - running mean|| + ||variance -
    running variance||.

    ``layers`` holds (input of a batch norm (B, C, ...), its running mean (C,), its
    running variance (C,)).
    """
    total = 0
    for x, mean, variance in layers:
        off_mean = off_variance = 0
        for c in range(x.shape[1]):
            values = x[:, c].reshape(-1)
            middle = sum(values) / len(values)
            off_mean = off_mean + (middle - mean[c]) ** 2
            off_variance = (
                off_variance
                + (sum((v - middle) ** 2 for v in values) / len(values) - variance[c]) ** 2
            )
        total = total + off_mean.sqrt() + off_variance.sqrt()
    return total


def l1_discrepancy(teacher_logits, student_logits):
    """DFAD: the mean over batch and classes of |t - s|."""
    pairs = [
        (t_c, s_c)
        for t, s in zip(teacher_logits, student_logits, strict=True)
        for t_c, s_c in zip(t, s, strict=True)
    ]
    return sum((t_c - s_c).abs() for t_c, s_c in pairs) / len(pairs)


def layer_inputs(model, images, names):
    """(logits, {layer name: what enters it}) of one pass."""
    found, handles = {}, []
    for name in names:
        keep = lambda module, args, name=name: found.__setitem__(name, args[0])  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, found


def dafl_terms(teacher, images, reader, one_hot, activation, balance):
    """DAFL's generator: cross-entropy with its own prediction - mean |features| -
    entropy of the mean prediction in digits.

    ``reader`` is the layer whose input are the features. Returns the weighed terms by
    name.
    """
    logits, found = layer_inputs(teacher, images, [reader])
    values = found[reader].reshape(-1)
    return {
        "one_hot": one_hot * own_prediction(logits),
        "activation": -activation * sum(v.abs() for v in values) / len(values),
        "balance": -balance * batch_entropy(logits) / math.log(10),
    }


def dfq_terms(teacher, student, images, adversarial, batch_norm, entropy, balance):
    """DFQ's generator: -KL(T || S) + batch-norm distance + instance entropy - batch
    entropy, weighed, by name.
    """
    norms = {name: m for name, m in teacher.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    logits, found = layer_inputs(teacher, images, norms)
    return {
        "adversarial": -adversarial * mean_kl(logits, student(images)),
        "batch_norm": batch_norm
        * batch_norm_distance(
            [(found[n], m.running_mean, m.running_var) for n, m in norms.items()]
        ),
        "entropy": entropy * instance_entropy(logits),
        "balance": -balance * batch_entropy(logits),
    }


def online_pseudo_batches(
    generator,
    teacher,
    student,
    noises,
    generator_terms,
    kd,
    adam,
    sgd,
    generator_lr,
    student_lrs,
    copies=None,
    alpha=0.1,
):
    """Pseudo-batches in which generator and student learn from the same images; the
    networks are changed in place.

    Generator and teacher run anew for each of the two, on the generator as it was, and
    everything carries gradients everywhere. ``generator_terms(images)`` and
    ``kd(teacher logits, student logits)`` are the losses; with ``copies`` the
    generator's has SV's term. One noise (B, z) and one of the student's learning rates
    per pseudo-batch.

    Returns:
        one dict of loss terms per pseudo-batch.
    """
    reports = []
    for noise, student_lr in zip(noises, student_lrs, strict=True):
        terms = generator_terms(generator(noise))
        if copies:
            images = generator(noise)
            terms["sv_synthesis"] = synthesis_term(
                shuffled_teacher(copies, images), teacher(images), alpha, "agreeing"
            )
        for_generator = torch.autograd.grad(sum(terms.values()), list(generator.parameters()))
        images = generator(noise)
        terms["kd"] = kd(teacher(images), student(images))
        for_student = torch.autograd.grad(terms["kd"], list(student.parameters()))
        adam.step(for_generator, generator_lr)
        sgd.step(for_student, student_lr)
        reports.append({name: term.item() for name, term in terms.items()})
    return reports


def dfad_pseudo_batches(
    generator, teacher, student, rounds, adam, sgd, generator_lr, student_lr, copies=None, alpha=0.1
):
    """DFAD as the official loop runs it: in each round one student step per noise but
    the last, then a generator step on it.

    ``rounds`` is a list of lists of noises (B, z); a last round whose generator step is
    not wanted ends in None.

    Returns:
        one dict of loss terms per student step; a generator's are with the student step
        after it.
    """
    reports, pending = [], {}
    for *noises, last in rounds:
        for noise in noises:
            images = generator(noise)
            loss = l1_discrepancy(teacher(images), student(images))
            sgd.step(torch.autograd.grad(loss, list(student.parameters())), student_lr)
            reports.append({**pending, "kd": loss.item()})
            pending = {}
        if last is None:
            break
        images = generator(last)
        terms = {"generator": -l1_discrepancy(teacher(images), student(images))}
        if copies:
            terms["sv_synthesis"] = synthesis_term(
                shuffled_teacher(copies, images), teacher(images), alpha, "agreeing"
            )
        adam.step(
            torch.autograd.grad(sum(terms.values()), list(generator.parameters())), generator_lr
        )
        pending = {name: term.item() for name, term in terms.items()}
    return reports


def soft_kd(teacher_logits, student_logits, temperature):
    """CMI: T^2 KL(T || S at temperature T), mean over the batch."""
    return temperature**2 * mean_kl(teacher_logits, student_logits, temperature)


def agreeing_kl(teacher_logits, student_logits):
    """CMI: KL(T || S) of the samples on which both call the same class, summed and
    divided by the whole batch's size.
    """
    pairs = [
        (t, s)
        for t, s in zip(teacher_logits, student_logits, strict=True)
        if t.argmax() == s.argmax()
    ]
    return sum((kl(t, s) for t, s in pairs), torch.zeros(())) / len(teacher_logits)


def cross_entropy(logits, targets):
    """The mean over the batch of -log p of the target."""
    return -sum(
        probabilities(sample)[target].log() for sample, target in zip(logits, targets, strict=True)
    ) / len(targets)


def instance_means(layers):
    """CMI: per sample, each layer's input (B, C, H, W) averaged over positions, one
    layer after the other; (B, features).
    """
    rows = []
    for i in range(len(layers[0])):
        rows.append(
            torch.stack(
                [
                    sum(x[i, c].reshape(-1)) / x[i, c].numel()
                    for x in layers
                    for c in range(x.shape[1])
                ]
            )
        )
    return torch.stack(rows)


def contrastive(local, whole, bank_local, bank_whole, temperature):
    """CMI: every local view is to find its own global one among all, by their cosine
    over the temperature.

    The mean over the batch of -log softmax, plus the mean over the bank when there is
    one.
    """
    candidates, means = [*whole, *bank_whole], []
    for queries, first in ((local, 0), (bank_local, len(local))):
        losses = []
        for i, query in enumerate(queries):
            cosines = [(query * other).sum() / query.norm() / other.norm() for other in candidates]
            losses.append(-probabilities(cosines, temperature)[first + i].log())
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means)


def total_variation(images):
    """DeepInversion: the l2 norms, over the whole batch, of the differences between
    neighbours in four directions, added.
    """
    count, channels, height, width = images.shape
    total = 0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = 0
        for n in range(count):
            for c in range(channels):
                for y in range(height):
                    for x in range(width):
                        if y + down < height and 0 <= x + right < width:
                            squares = (
                                squares
                                + (images[n, c, y + down, x + right] - images[n, c, y, x]) ** 2
                            )
        total = total + squares.sqrt()
    return total


def jensen_shannon(p_logits, q_logits, temperature):
    """The mean over the batch of (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, in
    nats.
    """
    total = 0
    for p, q in zip(p_logits, q_logits, strict=True):
        p, q = probabilities(p, temperature), probabilities(q, temperature)
        for p_c, q_c in zip(p, q, strict=True):
            m = (p_c + q_c) / 2
            total = total + (p_c * (p_c / m).log() + q_c * (q_c / m).log()) / 2
    return total / len(p_logits)


def resized_crop(image, box, mirrored):
    """One image (C, H, W) through a box (top, left, height, width in pixels), stretched
    to its size; zeros outside.

    A result's pixel looks at the point of the box that lies where its own centre lies
    in the result, and takes the four pixel centres around that point by their distances
    from it.
    """
    channels, height, width = image.shape
    top, left, tall, wide = (float(v) for v in box)
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            across = 1 - (x + 0.5) / width if mirrored else (x + 0.5) / width
            row, column = top + (y + 0.5) / height * tall - 0.5, left + across * wide - 0.5
            for j in (math.floor(row), math.floor(row) + 1):
                for i in (math.floor(column), math.floor(column) + 1):
                    if 0 <= j < height and 0 <= i < width:
                        for c in range(channels):
                            out[c, y, x] += (
                                (1 - abs(row - j)) * (1 - abs(column - i)) * image[c, j, i]
                            )
    return out
