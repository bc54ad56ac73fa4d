"""What commands know of the sequence encoder, without PyTorch."""

from __future__ import annotations

from ecoformer.models.registry import ModelFamily

FAMILY = ModelFamily(
    name="ecoformer.models.encoder",
    variants={"encoder": ("ecoformer", "msa", "msa_share_qk", "performer")},
    default_model="encoder",
    task="sequence",
    inputs="tokens",
    recipe={
        "smoothing": 0.0,
        "drop": 0.1,
        "drop_path": 0.0,
        "weight_decay": 0.0,
        # From --lr to 0 in a straight line.
        "sched": "poly",
        "decay_rate": 1.0,
        "min_lr": 0.0,
    },
)
