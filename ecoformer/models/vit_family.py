"""What commands and tables know of the small ViT."""

from __future__ import annotations

from ecoformer.models.registry import ModelFamily

FAMILY = ModelFamily(
    name="ecoformer.models.vit",
    variants={"vit_canvas": ("ecoformer", "msa", "msa_share_qk", "sra", "performer")},
    default_model="vit_canvas",
    first_conv="embed.conv",
    # For PAIRS, whose canvases are random already. AdamW takes twice as many steps to learn them.
    recipe={
        "data_set": "PAIRS",
        "input_size": 48,
        "batch_size": 64,
        "num_workers": 0,
        "repeated_aug": False,
        "mixup": 0.0,
        "cutmix": 0.0,
        "smoothing": 0.0,
        "drop_path": 0.0,
        "opt": "muon",
        "lr": 3.2e-2,
        "clip_grad": 1.0,
        "warmup_lr": 2e-3,
        "warmup_epochs": 1,
        "epochs": 64,
    },
)
