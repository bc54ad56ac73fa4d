"""Defaults that follow from a task, over those of a model's family."""

from __future__ import annotations

from collections.abc import Mapping

# Of what is not augmented as an image with one label is: no other value has a meaning.
NOT_AUGMENTED: Mapping[str, object] = {
    "repeated_aug": False,
    "color_jitter": 0.0,
    "aa": None,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
}
# An image with boxes or a map has no one label.
DENSE_WITHOUT_MEANING: Mapping[str, object] = {
    **NOT_AUGMENTED,
    "smoothing": 0.0,
}
_DENSE: Mapping[str, object] = {
    **DENSE_WITHOUT_MEANING,
    # Not that of the family's weights: an image has no one size.
    "input_size": 224,
    # Weights of a classifier begin another task, as published: with drop path.
    "train_mode": True,
    "weight_decay": 1e-4,
    "warmup_epochs": 0,
    "min_lr": 0.0,
    # 1e-4 for 16 images.
    "lr": 3.2e-3,
}

TASK_RECIPES: Mapping[str, Mapping[str, object]] = {
    "sequence": NOT_AUGMENTED,
    "detection": {
        **_DENSE,
        "batch_size": 2,
        "sched": "multistep",
        "decay_milestones": (8, 11),
        "epochs": 12,
    },
    "segmentation": {
        **_DENSE,
        "batch_size": 2,
        "short_side": 512,
        "sched": "poly",
        "decay_rate": 0.9,
        "epochs": 80,
    },
}
