"""Families as the command line sees them, and one configuration unlike the defaults."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ecoformer.family import ModelFamily


def build_nothing(*args: object, **kwargs: object) -> nn.Module:
    raise AssertionError("parsing settings must not build a model")


PVT_KINDS = ("ecoformer", "msa", "msa_share_qk", "sra", "performer")
SVT_KINDS = ("ecoformer", "msa", "lsa_msa", "lsa_gsa")
PCPVT_KINDS = ("ecoformer", "msa", "sra")
SIZES = ("small", "base", "large")

PVT = ModelFamily(
    name="pvt",
    create_model=build_nothing,
    variants={f"pvt_v2_b{i}": PVT_KINDS for i in range(6)} | {"pvt_v2_b2_li": ("sra",)},
    default_model="pvt_v2_b0",
    recipe={"drop_path": 0.1, "repeated_aug": True, "clip_grad": None},
)
TWINS = ModelFamily(
    name="twins",
    create_model=build_nothing,
    variants={f"alt_gvt_{size}": SVT_KINDS for size in SIZES}
    | {f"pcpvt_{size}_v0": PCPVT_KINDS for size in SIZES},
    default_model="alt_gvt_small",
    recipe={"drop_path": 0.2, "repeated_aug": False, "clip_grad": 5.0},
    released_names={f"alt_gvt_{size}": (f"alt_gvt_{size}", "msa") for size in SIZES}
    | {f"alt_gvt_{size}_ecoformer": (f"alt_gvt_{size}", "ecoformer") for size in SIZES}
    | {f"pcpvt_{size}_v0": (f"pcpvt_{size}_v0", "sra") for size in SIZES}
    | {"alt_gvt_small_sra_to_msa": ("alt_gvt_small", "lsa_msa")},
)


@pytest.fixture
def pvt() -> ModelFamily:
    """The PVTv2 family, which cannot build a model."""
    return PVT


@pytest.fixture
def twins() -> ModelFamily:
    """The Twins family, which cannot build a model."""
    return TWINS


@pytest.fixture
def changed() -> dict[str, Any]:
    """A value for every field, none of them the default."""
    return {
        "model": "pvt_v2_b1",
        "attn_type": "msa",
        "num_bits": 8,
        "num_anchors": 20,
        "num_similar": 5,
        "refit_every_epochs": 3,
        "num_fit_steps": 50,
        "value_bias": "normalized",
        "drop": 0.05,
        "drop_path": 0.3,
        "input_size": 64,
        "train_msa": True,
        "data_path": "images/of many kinds",
        "data_set": "FMNIST",
        "batch_size": 7,
        "num_workers": 0,
        "pin_mem": False,
        "repeated_aug": False,
        "dist_eval": False,
        "max_bad_images": 4,
        "color_jitter": 0.0,
        "aa": None,
        "smoothing": 0.0,
        "train_interpolation": "random",
        "reprob": 0.5,
        "remode": "const",
        "recount": 2,
        "resplit": True,
        "mixup": 0.0,
        "cutmix": 0.0,
        "cutmix_minmax": [0.2, 0.8],
        "mixup_prob": 0.9,
        "mixup_switch_prob": 0.4,
        "mixup_mode": "elem",
        "opt": "sgd",
        "opt_eps": 1e-6,
        "opt_betas": [0.8, 0.99],
        "momentum": 0.5,
        "weight_decay": 0.0,
        "clip_grad": 5.0,
        "lr": 25e-5,
        "sched": "step",
        "warmup_lr": 5e-7,
        "min_lr": 1e-6,
        "warmup_epochs": 0,
        "cooldown_epochs": 0,
        "decay_epochs": 10.0,
        "decay_rate": 0.5,
        "patience_epochs": 3,
        "lr_noise": [0.4, 0.9],
        "lr_noise_pct": 0.5,
        "lr_noise_std": 2.0,
        "epochs": 30,
        "grad_accum_steps": 4,
        "config": None,
        "finetune": "https://example.org/weights.pth",
        "resume": None,
        "eval": True,
        "throughput": "released",
        "output_dir": "runs/mine",
        "device": "cuda:1",
        "seed": 3,
        "start_epoch": 2,
        "amp_dtype": "none",
        "train_mode": False,
        "compile": True,
        "checkpoint_every": 15.0,
        "allow_resume_change": ["world-size", "config"],
    }
