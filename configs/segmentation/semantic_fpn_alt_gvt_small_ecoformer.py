r"""Semantic FPN over Twins-SVT-S with EcoFormer attention, from its classifier, on ADE20K.

Recipe: PVTv2's, 80,000 steps of 16 crops of 512 pixels, AdamW from 1e-4 to 0 by a power of 0.9,
which falls every 1,000 steps here.
Expected: nothing is published, and nothing was measured here.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main \
        --config configs/segmentation/semantic_fpn_alt_gvt_small_ecoformer.py \
        --data-path ADE20K --finetune runs/alt_gvt_small_ecoformer/best_checkpoint.pth
"""

_base_ = "../_base_/semantic_fpn.py"

model = "alt_gvt_small"
attn_type = "ecoformer"
