"""The naive oracle of the fast sources: their formulas as loops, for the tests alone."""

import copy

import literal
import torch
from torch import nn


def norms_of(model):
    """The batch norms by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def moments(x):
    """Per channel of (B, C, H, W) the mean and the biased variance, (C,) each."""
    means, variances = [], []
    for c in range(x.shape[1]):
        values = x[:, c].reshape(-1)
        middle = sum(values) / len(values)
        means.append(middle)
        variances.append(sum((v - middle) ** 2 for v in values) / len(values))
    return torch.stack(means), torch.stack(variances)


def smoothed(past, now, momentum):
    """momentum x past + (1 - momentum) x now, by layer; without a past, now."""
    if past is None:
        return now
    return {
        name: tuple(
            momentum * old + (1 - momentum) * new
            for old, new in zip(past[name], now[name], strict=True)
        )
        for name in now
    }


def off(teacher, found):
    """The sum over layers of ||mean - running mean|| + ||variance - running variance||."""
    total = 0
    for name, norm in norms_of(teacher).items():
        mean, variance = found[name]
        total = total + ((mean - norm.running_mean) ** 2).sum().sqrt()
        total = total + ((variance - norm.running_var) ** 2).sum().sqrt()
    return total


def fast_terms(teacher, student, images, targets, past, weights, momentum):
    """(weighed terms by name, the batch's own statistics): FastDFKD, NAYER.

    ``weights`` are those of batch_norm, one_hot and adversarial; the last one None
    before the student has learnt.
    """
    norms = norms_of(teacher)
    logits, found = literal.layer_inputs(teacher, images, norms)
    now = {name: moments(found[name]) for name in norms}
    terms = {
        "batch_norm": weights[0] * off(teacher, smoothed(past, now, momentum)),
        "one_hot": weights[1] * literal.cross_entropy(logits, targets),
    }
    if weights[2] is not None:
        answers = copy.deepcopy(student).eval()(images)
        terms["adversarial"] = -weights[2] * literal.agreeing_kl(logits, answers)
    return terms, now


def fastdfkd_rounds(meta, teacher, student, rounds, steps, lr, noise_lr, weights, warmup, momentum):
    """FastDFKD's meta learning, first-order MAML; ``meta`` is changed in place.

    ``rounds`` is a list of (noise, targets); images are shown to the networks as they
    are.

    Returns:
        (the best batch of each round, its terms).
    """
    outer = literal.Adam(meta.parameters(), betas=(0.5, 0.999))
    past, kept, reports = None, [], []
    for number, (noise, targets) in enumerate(rounds):
        fast, z = copy.deepcopy(meta), noise.clone().requires_grad_()
        inner = literal.Adam(fast.parameters(), betas=(0.5, 0.999))
        inner_z = literal.Adam([z], betas=(0.5, 0.999))
        sums, tries = [torch.zeros_like(p) for p in meta.parameters()], []
        own = (*weights[:2], None if number < warmup else weights[2])
        for _ in range(steps):
            images = fast(z)
            terms, now = fast_terms(teacher, student, images, targets, past, own, momentum)
            total = sum(terms.values())
            *slopes, slope_z = torch.autograd.grad(total, [*fast.parameters(), z])
            tries.append((total.item(), images.detach(), {k: v.item() for k, v in terms.items()}))
            sums = [a + b for a, b in zip(sums, slopes, strict=True)]
            inner.step(slopes, lr)
            inner_z.step([slope_z], noise_lr)
        outer.step(sums, lr * steps)
        past = smoothed(
            past, {n: tuple(x.detach() for x in each) for n, each in now.items()}, momentum
        )
        best = min(tries, key=lambda each: each[0])
        kept.append(best[1])
        reports.append(best[2])
    return kept, reports


def noisy_images(codes, labels, norm, maker, core, classes):
    """NAYER: one image after the other through the noisy layer that is its own; every
    ``classes`` images have one.
    """
    layers, order = maker.codes.shape[0], maker.codes.reshape(-1, codes.shape[1])
    assert all(torch.equal(order[i], codes[label]) for i, label in enumerate(labels))
    normed = norm.train()(order)  # over all codes of all layers, also those left over
    embedded = []
    for i in range(len(labels)):
        layer = i // classes
        assert layer < layers
        embedded.append(normed[i] @ maker.weight[layer] + maker.bias[layer, 0])
    return core(torch.stack(embedded))


def nayer_round(maker, teacher, student, labels, past, steps, lr, weights, momentum):
    """One batch of NAYER; the maker is changed in place.

    Returns:
        (the best images, their terms, the statistics remembered).
    """
    adam, tries = literal.Adam(maker.parameters(), betas=(0.5, 0.999)), []
    for _ in range(steps):
        images = maker()
        terms, now = fast_terms(teacher, student, images, labels, past, weights, momentum)
        total = sum(terms.values())
        slopes = torch.autograd.grad(total, list(maker.parameters()))
        tries.append((total.item(), images.detach(), {k: v.item() for k, v in terms.items()}))
        adam.step(slopes, lr)
    best = min(tries, key=lambda each: each[0])
    now = {n: tuple(x.detach() for x in each) for n, each in now.items()}
    return best[1], best[2], smoothed(past, now, momentum)


def cgdfkd_terms(teacher, student, images, asked, one_hot, batch_norm, adversarial, temperature):
    """The conditional generator's weighed terms by name; ``asked`` holds one-hot classes."""
    norms = norms_of(teacher)
    logits, found = literal.layer_inputs(teacher, images, norms)
    targets = torch.tensor([row.index(1) for row in asked])
    answers = student(images)
    return {
        "one_hot": one_hot * literal.cross_entropy(logits, targets),
        "batch_norm": batch_norm * off(teacher, {n: moments(found[n]) for n in norms}),
        "adversarial": -adversarial * literal.mean_kl(logits, answers, temperature),
    }


def choi_terms(teacher, student, images, alpha):
    """Choi et al.'s generator: -KL(T || S) + alpha x (divergence of Gaussians + instance
    entropy - batch entropy), by name.
    """
    norms = norms_of(teacher)
    logits, found = literal.layer_inputs(teacher, images, norms)
    off = 0
    for name, norm in norms.items():
        for mean, variance, to_mean, to_variance in zip(
            *moments(found[name]), norm.running_mean, norm.running_var, strict=True
        ):
            spread = (variance.sqrt() / to_variance.sqrt()).log()
            off = off + ((mean - to_mean) ** 2 + variance) / (2 * to_variance) - spread - 0.5
    return {
        "entropy": alpha * literal.instance_entropy(logits),
        "balance": -alpha * literal.batch_entropy(logits),
        "batch_norm": alpha * off,
        "adversarial": -literal.mean_kl(logits, student(images)),
    }
