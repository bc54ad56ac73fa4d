"""Families as the command line sees them, and one configuration unlike the defaults."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import pvt as pvt_package
import twins as twins_package
from ecoformer.models.registry import ModelFamily


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_nothing(*args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("parsing settings must not build a model")

    monkeypatch.setattr(ModelFamily, "create_model", build_nothing)


@pytest.fixture
def pvt(no_models: None) -> ModelFamily:
    """The PVTv2 family, which cannot build a model."""
    return pvt_package.FAMILY


@pytest.fixture
def twins(no_models: None) -> ModelFamily:
    """The Twins family, which cannot build a model."""
    return twins_package.FAMILY


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
        "max_tokens": 512,
        "train_msa": True,
        "data_path": "images/of many kinds",
        "data_set": "FMNIST",
        "short_side": 256,
        "long_side": 512,
        "batch_size": 7,
        "num_workers": 0,
        "pin_mem": False,
        "epoch_samples": 100,
        "eval_samples": 50,
        "eval_split": "test",
        "repeated_aug": False,
        "max_bad_images": 4,
        "scale": [0.5, 0.9],
        "hflip": 0.25,
        "color_jitter": 0.0,
        "aa": None,
        "smoothing": 0.0,
        "train_interpolation": "random",
        "tensor_resize": True,
        "reprob": 0.5,
        "remode": "const",
        "recount": 2,
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
        "decay_epochs": 10.0,
        "decay_milestones": [10, 20],
        "decay_rate": 0.5,
        "patience_epochs": 3,
        "lr_noise": [0.4, 0.9],
        "lr_noise_pct": 0.5,
        "lr_noise_std": 2.0,
        "epochs": 30,
        "grad_accum_steps": 4,
        "task": "other",
        "config": None,
        "finetune": "https://example.org/weights.pth",
        "allow_missing": True,
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
        "compile_mode": "reduce-overhead",
        "deterministic": True,
        "checkpoint_every": 15.0,
        "allow_resume_change": ["world-size", "config"],
        "dist_timeout": 20.0,
        "model_kwargs": ["head_drop=0.5"],
        "distill": "both",
        "distill_weight": 10.0,
        "teacher": "softmax.pth",
        "align_steps": 5,
    }
