r"""Semantic FPN over PVTv2-B2 as its authors made it, on ADE20K.

Recipe: PVTv2's, 80,000 steps of 16 crops of 512 pixels, AdamW from 1e-4 to 0 by a power of 0.9,
which falls every 1,000 steps here.
Expected: mIoU 45.2 on ADE20K's validation images, published for PVTv2; not measured here.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main \
        --config configs/segmentation/semantic_fpn_pvt_v2_b2_sra.py \
        --data-path ADE20K --finetune pvt_v2_b2.pth
"""

_base_ = "../_base_/semantic_fpn.py"

model = "pvt_v2_b2"
attn_type = "sra"
