"""Named settings. A preset overrides the defaults of the signatures; a caller's
overrides come last.

``settings("quick/digits", {"sv.alpha": 0.2})`` is one resolved :class:`Settings`; its
methods make the data set, the networks, the sources and the defenses that it describes.
Sections are those of :data:`SECTIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abdlab.paper_presets import (
    CIFAR10_PURIFIERS,
    FASTDFKD,
    PAPER,
    PAPER_CLEAN,
    PAPER_CMI,
    PAPER_OOD,
    PAPER_SR,
    PAPER_SV,
    PAPER_ZSKT,
)

#: The one switch between the formulas as the paper prints them and the scales of its
#: official code: what each sets, by section. It overrides a preset and is overridden by
#: single settings. Weights (alpha, weight, attention) stay as they are.
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "printed": {
        "zskt": {"class_mean": False},  # KL is the sum over classes, the mean over the batch
        "ood": {"class_mean": False},
        "sv": {
            "class_mean": False,
            # over the batch: samples on which T and T~ disagree count as 0
            "per": "batch",
            "reverse": False,  # KL(T~ || T)
            "ascent": False,  # OOD: 1 - phi + phi / alpha
        },
        "sr": {
            "fraction": 1.0,  # every image carries delta
            "per": "perturbed",
            "init_std": 0.1,  # a Gaussian start, of our width: the signature's
            "perturb": "student",
        },
    },
    "code": {
        "zskt": {"class_mean": True},  # KL is also divided by the number of classes
        "ood": {"class_mean": True},
        "sv": {
            "class_mean": True,
            "per": "agreeing",  # divided by the number of agreeing samples
            "reverse": True,  # KL(T || T~), also in verification
            "ascent": True,  # OOD: mean over the others - alpha x mean over the suspicious
        },
        "sr": {
            "fraction": 2 / 128,  # 2 images of 128 carry delta ...
            "per": "batch",  # ... and their sum is divided by 128
            "init_std": 0.0,  # delta starts from 0, where round-off decides the direction
            "perturb": "teacher",
            "order": 1,  # a delta for the teacher does not depend on the student
        },
    },
}

#: name -> section -> values. :data:`ABOUT` says what each is, and on what it was
#: verified.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # A laptop's CPU, minutes. Tuned on seed 0's teacher; the README has the figures
    # over seeds 13 to 15, and what was tried.
    "quick/digits": {
        "data": {"name": "digits"},
        "attack": {"trigger": "badnet_sq", "params": {"size": 5}, "rate": 0.1, "target": 0},
        "teacher": {"model": "wrn-10-2", "epochs": 12, "batch_size": 64, "schedule": "onecycle"},
        "pgd": {"eps": 0.1},  # of black and white images
        "trades": {"eps": 0.1},
        "shuffled": {"layers": 2},  # as many as sv shuffles
        "student": {"model": "wrn-10-1"},
        "zskt": {"pseudo_batches": 640, "batch_size": 32, "width": 24},
        "cmi": {
            "rounds": 10,
            "synthesis_steps": 40,
            "kd_steps": 40,
            "synthesis_batch": 64,
            "batch_size": 64,
            "width": 24,
            "negatives": 512,
        },
        "deepinversion": {
            "rounds": 10,
            "synthesis_steps": 60,
            "kd_steps": 40,
            "synthesis_batch": 64,
            "batch_size": 64,
        },
        # small images want slower generators than the papers': faster ones leave a
        # class out, or run away from the student
        "dafl": {
            "pseudo_batches": 1000,
            "batch_size": 64,
            "width": 24,
            "z": 256,
            "one_hot": 0.5,
            "generator_lr": 2e-4,
            "student_lr": 0.2,
        },
        "dfad": {
            "pseudo_batches": 1200,
            "batch_size": 64,
            "width": 24,
            "generator_lr": 2e-4,
            "student_lr": 0.2,
            "milestones": [0.6, 0.85],
            "clip": 5.0,
        },
        "dfq": {"pseudo_batches": 400, "batch_size": 64, "width": 24, "z": 100},
        "choi": {"pseudo_batches": 160, "batch_size": 32, "width": 24},
        "fastdfkd": {
            "rounds": 20,
            "warmup": 10,
            "synthesis_steps": 10,
            "generator_lr": 2e-3,
            "kd_steps": 20,
            "batch_size": 32,
            "lr": 0.1,
            "width": 24,
        },
        "nayer": {
            "rounds": 30,
            "warmup": 3,
            "synthesis_steps": 15,
            "kd_steps": 40,
            "batch_size": 32,
            "lr": 0.1,
            "width": 24,
        },
        "cgdfkd": {"pseudo_batches": 160, "batch_size": 32, "width": 24, "attention": 0.0},
        # a photograph is far from digits: seed 0 ends at ACC 80 %, ASR 100 % after
        # 2,560 steps
        "ood": {
            "image": "flower",
            "patches": 4096,
            "epochs": 20,
            "batch_size": 32,
            "lr": 5e-3,
            "temperature": 2.0,
        },
        "mixed": {"members": {"zskt": 0.5, "ood": 0.5}, "pseudo_batches": 400},
        "clean": {"epochs": 100, "batch_size": 64},
        # no shuffle seen on digits had the tail that verification asks for (see the
        # README): the first one is used unseen a stronger or a longer vaccine keeps the
        # target class itself away, and self-retrospection then unlearns the class
        "sv": {
            "layers": 2,
            "alpha": 0.01,
            "cap": 1.0,
            "verify": False,
            "warmup": 0.0,
            "stop": 0.25,
        },
        # the paper's, beside ours: on digits its additive delta is unlike any trigger. Its
        # own anchor, the student, costs ACC (seed 0: 60.0/100 at weight 1)
        "sr": {"start": 0.9, "weight": 10.0, "anchor": "teacher", "statistics": "mixed"},
    },
    # CIFAR-10 on two CPU cores, in 2 hours with both triggers
    # (notebooks/studies/cifar10_reduced.yaml): the paper's networks made smaller, its
    # runs made 10 to 100 times shorter, its vaccine as it is, and self-retrospection
    # with inverted triggers.
    "reduced/cifar10": {
        "data": {"name": "cifar10"},
        **CIFAR10_PURIFIERS,
        "attack": {"trigger": "badnet_sq", "rate": 0.1, "target": 0},  # [paper]
        "teacher": {
            "model": "wrn-16-1",  # [paper] wrn-16-2
            "epochs": 10,  # [paper] 200
            "batch_size": 128,  # [paper]
            "lr": 0.1,  # [paper]
            "weight_decay": 5e-4,  # [paper]
            "schedule": "onecycle",  # [paper] cosine
            "precision": "bf16",
        },
        "student": {"model": "wrn-16-1", "precision": "bf16"},  # [paper]
        "ood": {
            **PAPER_OOD,
            "epochs": 24,  # [paper] 300
            "batch_size": 128,  # [paper] 512
            "lr": 3e-3,  # [paper] 1e-3
            "drops": [0.6, 0.85],  # [paper] .5 and the end
            "gamma": 0.2,  # [paper] .5
            "temperature": 4.0,  # [paper] 8
        },
        "cmi": {
            **PAPER_CMI,
            "rounds": 10,  # [paper] 200
            "synthesis_steps": 50,  # [paper] 200
            "kd_steps": 80,  # [paper] 400
            "synthesis_batch": 64,  # [paper] 256
        },
        "zskt": {**PAPER_ZSKT, "pseudo_batches": 300},  # [paper] 80,000
        # not yet measured at this size
        "fastdfkd": {
            **FASTDFKD,
            "rounds": 40,  # its paper: 200
            "warmup": 10,  # 20
            "kd_steps": 60,  # 400
            "batch_size": 128,  # 256
            "lr": 0.1,  # .2
        },
        # these three by analogy, as unmeasured
        "nayer": {
            "rounds": 20,  # its paper: 200
            "warmup": 10,  # 200
            "synthesis_steps": 15,  # 30
            "kd_steps": 120,  # 200
            "batch_size": 128,  # 400
            "lr": 0.1,  # .2
        },
        "cgdfkd": {"pseudo_batches": 300},
        "choi": {"pseudo_batches": 300, "batch_size": 128},
        "clean": {**PAPER_CLEAN, "epochs": 30},  # ours: 200
        "sv": {**PAPER_SV, "stop": 0.95},  # [paper] .99: where SR begins
        # the paper's delta within so few steps costs ACC and leaves the backdoor
        "sr": {**PAPER_SR, "start": 0.95},  # [paper] .99, of runs 10 to 100 times as long
        "tu": {
            "start": 0.95,
            "inner_steps": 20,
            "renewals": 58,
            "balance": 1.0,
            "without": [],
            "hold": False,
        },
    },
    **PAPER,
}


#: the method that the workbench begins with
METHOD = "zskt+sv+tu"
#: what a student of a stranger's teacher is defended with, and the same for a teacher
#: without batch norm, whose statistics nayer would need
DEFENDED, NORMLESS = "unlearn+bounded/nayer", "bounded/zskt"


@dataclass(frozen=True)
class About:
    """What a preset is in one line, and what it was verified on, with figures; empty
    while it was not.
    """

    title: str
    verified: str = ""

    @property
    def mark(self) -> str:
        """ "verified on ..." or "not yet verified"."""
        return f"verified on {self.verified}" if self.verified else "not yet verified"


#: one entry per preset
ABOUT: dict[str, About] = {
    "quick/digits": About(
        "embedded digits, WRN-10-2 to WRN-10-1, minutes on a laptop's CPU",
        "seeds 13, 14, 15 on a CPU (ACC/ASR in %): teacher 99.9/100.0, clean KD 99.3/1.8, ZSKT"
        " 98.0/91.0, ZSKT+TU 97.5/24.6, ZSKT+SV+TU 95.9/22.7, so the defense removes most of the"
        " backdoor, not as much of it on every seed",
    ),
    "reduced/cifar10": About(
        "CIFAR-10 in 2 hours of two CPU cores, WRN-16-1 to WRN-16-1, patches of one photograph"
        " or CMI",
        "badnet_sq, seed 0 on a CPU (ACC/ASR in %): teacher 79.9/94.9, OOD 70.1/57.0, OOD+SV+TU"
        " 68.7/16.9, no vaccine found; CMI 37.7/18.9 is too short to inherit much",
    ),
    "paper/cifar10/zskt": About("the paper's CIFAR-10 setting, WRN-16-2 to WRN-16-1, ZSKT"),
    "paper/cifar10/zskt-wrn-40-2": About("the same with a WRN-40-2 as teacher"),
    "paper/cifar10/cmi": About(
        "the paper's CIFAR-10 setting, WRN-16-2 to WRN-16-1, contrastive model inversion"
    ),
    "paper/cifar10/ood": About(
        "the paper's CIFAR-10 setting, WRN-16-2 to WRN-16-1, patches of one photograph"
    ),
    "paper/cifar10/fastdfkd": About(
        "the paper's CIFAR-10 networks and attack, WRN-16-2 to WRN-16-1, FastDFKD"
    ),
    "paper/gtsrb/fastdfkd": About(
        "the paper's GTSRB networks and attack, WRN-16-2 to WRN-16-1, FastDFKD"
    ),
    "paper/gtsrb/zskt": About("the paper's GTSRB setting, WRN-16-2 to WRN-16-1, ZSKT"),
}

#: preset -> trigger -> values of section "attack" that :func:`settings` takes when that
#: trigger is named instead of the preset's
ATTACKS: dict[str, dict[str, dict[str, Any]]] = {
    # Tuned on seed 0 (the README has each trigger's ACC and ASR); those that are not
    # named reach theirs with the defaults.
    "quick/digits": {
        # the period in pixels that 6 per width have at 32; fainter ones, or with more
        # clean zeros left, are not learnt
        "sig": {"params": {"strength": 0.6, "frequency": 3}, "rate": 0.09},
        # of a clean-label attack nearly the whole class must carry the trigger (128 of
        # 1,297 are zeros, and 9.5 % are 123)
        "cl": {"params": {"size": 4}, "rate": 0.095},
        "l2_inv": {"optimize": {"bound": 0.05}},
        "wanet": {"params": {"pixels": 1.0}},
        # black and white digits do not notice the paper's 8/255
        "weak": {"optimize": {"bound": 32 / 255}},
    },
}
