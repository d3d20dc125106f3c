"""Shuffling Vaccine (Hong et al., ICML 2023, arXiv 2306.02368, section 4.1): close the
road through bad synthetic inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from abdlab.defenses.defense import Defense, Plan
from abdlab.evaluate import kl, log_kl
from abdlab.features import module_at

#: whose kernels have the input channels in their second dimension (transposed ones have
#: not)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: alpha of the two forms that weigh the student's loss: the suspicious samples are
#: divided by it, or ascended with it (as in the official sweeps)
KD_ALPHA = {"weights": 10.0, "ascent": 0.1}


class VaccineNotFound(UserWarning):
    """No shuffle of the teacher passed verification, so that the Shuffling Vaccine
    stays off.
    """


def shuffled_layers(model: nn.Module, last: int) -> list[str]:
    """Names of the ``last`` convolutions, found by type, in the order in which the
    model registers them.

    Convolutions that see one input channel (per group) cannot be shuffled and do not
    count.

    Raises:
        ValueError: when the model has fewer.
    """
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, CONVOLUTIONS) and m.in_channels > m.groups
    ]
    if last < 1 or last > len(names):
        raise ValueError(
            f"the last {last} convolutions were asked for, but {type(model).__name__} has"
            f" {len(names)} that can be shuffled"
        )
    return names[-last:]


class ShuffledTeacher:
    """T~: the mean logits of k copies of a teacher whose named convolutions see their
    input channels in random order.

    Args:
        teacher: in eval mode; it is never changed.
        layers: names of the convolutions, see :func:`shuffled_layers`.
        k: number of copies; every copy and layer has its own permutation.
        rng: a CPU generator that draws the permutations.
        permutations: (k, input channels per group) per layer, instead of drawing.

    All copies run in one pass: the layers before the first shuffled one are shared, on
    request with the teacher itself too (:meth:`beside`); from there on all of them are
    one batch, and only a shuffled layer takes it apart, for the permuted kernels of
    each; the first ones, whose input is shared, are one convolution with the kernels of
    all. Where a path goes round the first shuffled layer, the passes part at the
    smallest block around it that has no such path. Where there is none (checked once,
    against copies with permuted weights), the k copies run one by one.
    """

    def __init__(
        self,
        teacher: nn.Module,
        layers: Sequence[str],
        k: int = 3,
        rng: torch.Generator | None = None,
        permutations: dict[str, Tensor] | None = None,
    ):
        if k < 1:
            raise ValueError(f"k, the number of shuffled copies, must be at least 1, not {k}")
        self.teacher, self.layers, self.k = teacher, list(layers), k
        if permutations is None:
            widths = {
                name: module_at(teacher, name).in_channels // module_at(teacher, name).groups
                for name in layers
            }
            permutations = {
                name: torch.stack([torch.randperm(c, generator=rng) for _ in range(k)])
                for name, c in widths.items()
            }
        self.permutations = {name: value.cpu() for name, value in permutations.items()}
        self._parting: list[str] | None = (
            None  # where the passes part, see _parts_at; None: not tried yet
        )
        device = next(teacher.parameters()).device
        self._kernels = {name: order.to(device) for name, order in self.permutations.items()}
        self._inputs = {name: self._input_order(name).to(device) for name in layers}

    def __call__(self, images: Tensor) -> Tensor:
        """Mean logits (N, classes) of the k copies; differentiable to the images."""
        return (
            self._together(images).mean(0)
            if self._parts_at(images)
            else self.copies(images).mean(0)
        )

    def beside(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the teacher's own logits, the mean logits of the copies), (N, classes) each:
        as two calls, at less cost.
        """
        if not self._parts_at(images):
            return self.teacher(images), self(images)
        own, *shuffled = self._together(images, with_teacher=True)
        return own, torch.stack(shuffled).mean(0)

    def copies(self, images: Tensor) -> Tensor:
        """Logits (k, N, classes), each copy run by itself with permuted weights."""
        return torch.stack(
            [functional_call(self.teacher, self.weights(j), (images,)) for j in range(self.k)]
        )

    def weights(self, copy: int) -> dict[str, Tensor]:
        """The permuted kernels of one copy, by parameter name."""
        return {
            f"{name}.weight": module_at(self.teacher, name).weight[:, order[copy]]
            for name, order in self._kernels.items()
        }

    def _together(self, images: Tensor, with_teacher: bool = False) -> Tensor:
        """Logits (k, N, classes) of the copies, or (k + 1, N, classes) with the
        teacher's first, in one pass.
        """
        count, (block,) = self.k + with_teacher, self._parting
        handle, modules = None, {name: module_at(self.teacher, name) for name in self.layers}
        norms = [
            m
            for m in self.teacher.modules()
            if type(m) in NORMS and not m.training and m.running_var is not None
        ]
        norms = norms if images.device.type == "cpu" else []
        try:
            if block:
                handle = module_at(self.teacher, block).register_forward_pre_hook(
                    lambda module, args: (torch.cat([args[0]] * count), *args[1:])
                )
            for name, module in modules.items():
                module.forward = partial(
                    self._convolve, name, module, count, None if block else len(images)
                )
            for module in norms:
                module.forward = partial(_normalized, module)
            return self.teacher(images).unflatten(0, (count, len(images)))
        finally:
            if handle is not None:
                handle.remove()
            for module in (*modules.values(), *norms):
                module.__dict__.pop("forward", None)

    def _convolve(
        self, name: str, module: nn.Module, count: int, shared: int | None, x: Tensor
    ) -> Tensor:
        """A shuffled layer on all passes: on ``shared`` images as they are before the
        passes part, or on count x as many.
        """
        own, together = count - self.k, shared == len(x)
        parts = [x] * count if together else x.chunk(count)
        # whatever else it does with its input, it gets that shuffled
        if type(module) not in CONVOLUTIONS:
            moved = [
                part.index_select(1, order)
                for part, order in zip(parts[own:], self._inputs[name], strict=True)
            ]
            return type(module).forward(module, torch.cat([*parts[:own], *moved]))
        kernels = [module.weight] * own + list(module.weight[:, self._kernels[name]].unbind(1))
        if together and module.groups == 1:
            bias = None if module.bias is None else module.bias.repeat(count)
            return torch.cat(module._conv_forward(x, torch.cat(kernels), bias).chunk(count, 1))
        return torch.cat(
            [
                module._conv_forward(part, k, module.bias)
                for part, k in zip(parts, kernels, strict=True)
            ]
        )

    def _parts_at(self, images: Tensor) -> list[str]:
        """Where passes part: [""] at the shuffled layers themselves, or [block], or []
        when no place gives the right numbers.
        """
        if self._parting is None:
            first = self.layers[0].split(".")
            blocks = ["", *(".".join(first[:depth]) for depth in range(len(first) - 1, 0, -1))]
            probe = images[:1].detach().expand(2, *images.shape[1:])
            self._parting = next(([block] for block in blocks if self._agrees(probe, block)), [])
        return self._parting

    @torch.no_grad()
    def _agrees(self, images: Tensor, block: str) -> bool:
        self._parting = [block]
        try:
            with torch.autocast(
                images.device.type, enabled=False
            ):  # round-off would hide what is compared
                wanted = torch.cat([self.teacher(images)[None], self.copies(images)])
                got = self._together(images, with_teacher=True)
            # a GPU convolves in TF32, and other shapes are other algorithms there
            near = 1e-2 if images.is_cuda else 1e-4
            return torch.allclose(got, wanted, rtol=1e-3, atol=near * wanted.abs().max().item())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError):
            # shapes clash, as a path round the block meets the copies, or it takes no tensor
            return False

    def _input_order(self, name: str) -> Tensor:
        """(k, in_channels): the order of the activations that equals the permuted
        kernels.
        """
        groups, inverse = module_at(self.teacher, name).groups, self.permutations[name].argsort(1)
        return torch.cat([inverse + g * inverse.shape[1] for g in range(groups)], dim=1)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm in eval mode as what it is, one factor and one summand per channel.

    torch's own gradient of it takes nine times as long on a CPU in channels_last, also
    where no weight wants one.
    """
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    if x.dtype != factor.dtype:
        return type(norm).forward(norm, x)
    summand = -norm.running_mean * factor
    summand = summand if norm.bias is None else summand + norm.bias
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(summand.view(shape), x, factor.view(shape))


def suspicion(
    vaccine: ShuffledTeacher,
    teacher: nn.Module,
    images: Tensor,
    batch: int = 1000,
    reverse: bool = False,
) -> Tensor:
    """log10 KL(T~(x) || T(x)) per image, float64 (N,): low is suspicious (paper,
    section 4.1). Clamped below at -12.

    Args:
        reverse: KL(T(x) || T~(x)) instead, which is what the official code computes.
    """
    with torch.no_grad():
        pairs = ((vaccine(part), teacher(part)) for part in images.split(batch))
        return torch.cat(
            [log_kl(t, shuffled) if reverse else log_kl(shuffled, t) for shuffled, t in pairs]
        )


def tail_share(scores: Tensor, sigma: float = 3.0) -> float:
    """Share of the scores below mean - sigma x std; a Gaussian has .00135 below 3. Of
    no scores it is 0.
    """
    if len(scores) == 0:
        return 0.0
    return (scores < scores.mean() - sigma * scores.std(correction=0)).double().mean().item()


def kd_weights(suspicious: Tensor, alpha: float, ascent: bool = False) -> Tensor:
    """Factors (N,) of the student's loss per sample, whose mean over the batch is then
    taken.

    Args:
        suspicious: (N,) booleans, the phi of the paper.
        alpha: a suspicious sample's factor is 1/alpha, the others' 1 (paper: 1 - phi +
            phi / alpha), so that a number above 1 weakens suspicious samples.
        ascent: instead, the official code's mean over the others - alpha x mean over
            the suspicious. Where one of the two is empty its mean is 0 (there it is
            NaN): a batch of only suspicious samples is ascended on, alpha x its mean.
    """
    phi = suspicious.to(torch.get_default_dtype())
    if not ascent:
        return 1 - phi + phi / alpha
    others = 1 - phi
    return len(phi) * (others / others.sum().clamp_min(1) - alpha * phi / phi.sum().clamp_min(1))


class ShufflingVaccine(Defense):
    """A shuffled teacher forgets the classes but still answers to a trigger: keep the
    source away from where they agree.

    Where the source synthesises, its generator also maximises ``alpha`` x the mean of
    KL(T~ || T), mean over classes, over the suspicious samples, those on which T and T~
    predict the same class (0 when there are none). Where it does not (OOD, clean KD),
    the student's loss on the suspicious samples is weighed instead, see
    :func:`kd_weights`. The report says which of the two was used.

    Args:
        k: shuffled copies.
        layers: the last so many convolutions are shuffled, or the names of the layers
            themselves. The default suits WRN-16-2, where they are the third stage.
        alpha: weight of the synthesis term, or a plan of weights
            (:data:`~abdlab.defenses.defense.Plan`). With ``per="agreeing"`` the sum is
            divided by the number of agreeing samples (official code), with
            ``per="batch"`` by the batch size.
        class_mean: the synthesis term's KL is also divided by the number of classes
            (official code); False: the sum.
        form: "auto" takes the synthesis term where the source synthesises and weights
            where it does not; "synthesis" is the term alone; "weights" weighs the
            samples of every source, without the term.
        ascent: the weights are those of the official code, which ascends on suspicious
            samples, not those of the paper.
        kd_alpha: the alpha of the weights; None: that of :data:`KD_ALPHA`, 10 for the
            paper's weights, where only a number above 1 weakens suspicious samples, and
            .1 for the ascent.
        reverse: take KL(T || T~), as the official code does, and not the printed KL(T~
            || T), in the synthesis term and in the verification's score. On digits
            (badnet_sq, the last two convolutions, four shuffles) the reverse score
            tells triggered from clean images with an AUC of .94 to .97, the printed one
            with .64 to .80.
        cap: KL, in nats, above which a sample is not pushed further; None is the
            paper's unbounded term. It has no upper limit even where both agree, and
            once the student is good it outweighs the generator's own loss: on digits
            the generator then makes nothing but extreme images of one class. With a cap
            only suspicious samples are pushed.
        warmup: undefended share of the run, in [0, 1), whose images fill the
            verification pool; at least one pseudo-batch when it verifies. A run that
            branches into the vaccine warms up from there.
        stop: share of the run after which the vaccine is off (the lambda of the paper).
        tries: shuffles to try; the first that verifies is used.
        sigma, threshold: a shuffle verifies when more than ``threshold`` of the pool
            scores below mean - sigma x std.
        pool: at most this many images are kept for verification, the latest ones
            (bounded memory: pool x image size).
        verify: False takes the first shuffle unseen; the report says so.

    Warns:
        VaccineNotFound: when no shuffle verifies. The vaccine is then off, and
            :meth:`report` has ``found: False``.
    """

    tunable = ("alpha",)
    captures = True

    def __init__(
        self,
        *,
        k: int = 3,
        layers: int | Sequence[str] = 5,
        alpha: Plan = 0.1,
        per: str = "agreeing",
        class_mean: bool = True,
        form: str = "auto",
        ascent: bool = False,
        kd_alpha: float | None = None,
        reverse: bool = False,
        cap: float | None = None,
        warmup: float = 0.1,
        stop: float = 1.0,
        tries: int = 8,
        sigma: float = 3.0,
        threshold: float = 0.02,
        pool: int = 2048,
        verify: bool = True,
    ):
        if per not in ("agreeing", "batch"):
            raise ValueError(f"per is 'agreeing' or 'batch', not {per!r}")
        if form not in ("auto", "synthesis", "weights"):
            raise ValueError(f"form is 'auto', 'synthesis' or 'weights', not {form!r}")
        if kd_alpha is not None and kd_alpha <= 0:
            raise ValueError(
                "kd_alpha divides, or weighs, the loss of suspicious samples and is above 0, not"
                f" {kd_alpha}"
            )
        if not 0 <= warmup < 1 or not 0 <= stop <= 1:
            raise ValueError(
                f"warmup and stop are shares of the run in [0, 1], not {warmup} and {stop}"
            )
        if tries < 1 or pool < 2:
            raise ValueError(
                f"tries must be at least 1 and pool at least 2, not {tries} and {pool}"
            )
        self.k, self.layers, self.per, self.warmup, self.stop = k, layers, per, warmup, stop
        self.alpha = self.plan("alpha", alpha)
        self.class_mean, self.form, self.ascent, self.reverse = class_mean, form, ascent, reverse
        self.kd_alpha = (
            KD_ALPHA["ascent" if ascent else "weights"] if kd_alpha is None else kd_alpha
        )
        if cap is not None and cap <= 0:
            raise ValueError(f"cap is a KL in nats above 0, or None, not {cap}")
        self.cap, self.tries, self.sigma, self.threshold, self.pool, self.verify = (
            cap,
            tries,
            sigma,
            threshold,
            pool,
            verify,
        )

    @property
    def name(self) -> str:
        return "sv"

    def start(self, teacher, student, device, seed, length):
        super().start(teacher, student, device, seed, length)
        self.names = self.layer_names(teacher)
        self.vaccine: ShuffledTeacher | None = None
        self.shares: list[float] = []
        self.decided = False
        self.began: int | None = None
        self.last = round(self.stop * length)
        self.seen: list[Tensor] = []
        self.active = False
        self.ready: tuple[Tensor | None, Tensor | None] = (
            None,
            None,
        )  # images, and the vaccine's logits on them
        self.used: list[str] = []  # forms, in the order in which they were first used
        self.weighed = torch.zeros(
            2, dtype=torch.long, device=device
        )  # how many suspicious samples, of how many weighed

    def layer_names(self, teacher: nn.Module) -> list[str]:
        """The convolutions that it shuffles in this teacher. Raises ValueError when
        they are not there.
        """
        if isinstance(self.layers, int):
            return shuffled_layers(teacher, self.layers)
        for name in self.layers:
            if not isinstance(module_at(teacher, name), CONVOLUTIONS):
                raise ValueError(f"{name} is no convolution, and only convolutions are shuffled")
        return list(self.layers)

    def before(self, index):
        events = []
        self.began = index if self.began is None else self.began
        warm = max(round(self.warmup * self.length), 1 if self.verify else 0)
        if not self.decided and index >= self.began + warm:
            events = self._decide()
        self.active = self.vaccine is not None and index < self.last
        return events

    def branch(self):
        return self.active, self.alpha, self.vaccine

    def observe(self, batch):
        if not self.decided and self.verify:
            self.seen.append(batch.images.clone())
            while sum(map(len, self.seen)) - len(self.seen[0]) >= self.pool:
                self.seen.pop(0)

    def teacher_logits(self, images):
        if not self.active or self.form == "weights":
            return None
        logits, shuffled = self.vaccine.beside(images)
        self.ready = images, shuffled
        return logits

    def synthesis_term(self, images, teacher_logits):
        if not self.active or self.form == "weights":
            return None
        self._use("synthesis")
        (seen, shuffled), self.ready = self.ready, (None, None)
        if seen is not images:
            shuffled = self.vaccine(images)
        agree = shuffled.argmax(1) == teacher_logits.argmax(1)
        per_sample = kl(teacher_logits, shuffled) if self.reverse else kl(shuffled, teacher_logits)
        per_sample = per_sample.clamp_max(self.cap) if self.cap else per_sample
        per_sample = (
            per_sample / teacher_logits.shape[1] if self.class_mean else per_sample
        ) * agree
        count = agree.sum().clamp_min(1) if self.per == "agreeing" else len(images)
        return -self.alpha * per_sample.sum() / count

    @torch.no_grad()
    def sample_weights(self, batch):
        if (
            not self.active
            or self.form == "synthesis"
            or (self.form == "auto" and batch.synthesised)
        ):
            return None
        self._use("ascent" if self.ascent else "weights")
        suspicious = self.vaccine(batch.images).argmax(1) == batch.logits.argmax(1)
        self.weighed[0] += suspicious.sum()
        self.weighed[1] += len(suspicious)
        return kd_weights(suspicious, self.kd_alpha, self.ascent)

    def _use(self, form: str) -> None:
        if form not in self.used:
            self.used.append(form)

    def _decide(self) -> list[str]:
        self.decided = True
        if not self.verify:
            self.vaccine = ShuffledTeacher(self.teacher, self.names, self.k, self.rng)
            return ["shuffling vaccine: the first shuffle is used without verification"]
        images = torch.cat(self.seen)[-self.pool :]
        self.seen = []
        for number in range(1, self.tries + 1):
            vaccine = ShuffledTeacher(self.teacher, self.names, self.k, self.rng)
            self.shares.append(
                tail_share(
                    suspicion(vaccine, self.teacher, images, reverse=self.reverse), self.sigma
                )
            )
            if self.shares[-1] > self.threshold:
                self.vaccine = vaccine
                return [
                    f"shuffling vaccine: found at try {number}, {self.shares[-1]:.1%} of the"
                    " synthetic images are suspicious"
                ]
        message = (
            f"no shuffling vaccine was found in {self.tries} tries: at most {max(self.shares):.1%}"
            f" of the synthetic images score below mean - {self.sigma:g} std, {self.threshold:.1%}"
            " are needed. The vaccine is off; self-retrospection is the fall-back"
        )
        warnings.warn(message, VaccineNotFound, stacklevel=2)
        return [message]

    def state(self):
        return {
            **super().state(),
            "decided": self.decided,
            "began": self.began,
            "shares": self.shares,
            "seen": self.seen,
            "used": self.used,
            "weighed": self.weighed,
            "permutations": None if self.vaccine is None else self.vaccine.permutations,
        }

    def restore(self, state):
        super().restore(state)
        self.decided, self.began, self.shares = (
            state["decided"],
            state["began"],
            list(state["shares"]),
        )
        self.seen = [part.to(self.device) for part in state["seen"]]
        self.used, self.weighed = list(state["used"]), state["weighed"].to(self.device)
        if state["permutations"] is not None:
            self.vaccine = ShuffledTeacher(
                self.teacher, self.names, self.k, permutations=state["permutations"]
            )

    def report(self):
        suspicious, weighed = self.weighed.tolist()
        return {
            "found": self.vaccine is not None,
            "verified": self.verify and self.vaccine is not None,
            "tries": len(self.shares),
            "suspicious_shares": [round(s, 5) for s in self.shares],
            "layers": self.names,
            "forms": self.used,
            **({"weighed_suspicious": round(suspicious / weighed, 5)} if weighed else {}),
        }
