r"""Semantic FPN over Twins-SVT-S as its authors made it, on ADE20K.

Recipe: PVTv2's, 80,000 steps of 16 crops of 512 pixels, AdamW from 1e-4 to 0 by a power of 0.9,
which falls every 1,000 steps here.
Expected: nothing was measured here.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main \
        --config configs/segmentation/semantic_fpn_alt_gvt_small_lsa_gsa.py \
        --data-path ADE20K --finetune alt_gvt_small.pth
"""

_base_ = "../_base_/semantic_fpn.py"

model = "alt_gvt_small"
attn_type = "lsa_gsa"
