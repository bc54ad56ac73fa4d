r"""Semantic FPN over PVTv2-B2 with EcoFormer attention, from its classifier, on ADE20K.

Recipe: PVTv2's, 80,000 steps of 16 crops of 512 pixels, AdamW from 1e-4 to 0 by a power of 0.9,
which falls every 1,000 steps here.
Expected: nothing is published, and nothing was measured here. The original:
semantic_fpn_pvt_v2_b2_sra.py.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main \
        --config configs/segmentation/semantic_fpn_pvt_v2_b2_ecoformer.py \
        --data-path ADE20K --finetune runs/pvt_v2_b2_ecoformer/best_checkpoint.pth
"""

_base_ = "../_base_/semantic_fpn.py"

model = "pvt_v2_b2"
attn_type = "ecoformer"
