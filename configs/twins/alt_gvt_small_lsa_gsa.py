r"""Twins-SVT-S as its authors made it, with window and spatial reduction attention.

Recipe: the one that Twins released; from nothing, 300 epochs.
Expected: 81.7 % top-1 on ImageNet, as published for Twins.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/alt_gvt_small_lsa_gsa.py \
        --data-path IMAGENET
"""

model = "alt_gvt_small"
attn_type = "lsa_gsa"
batch_size = 128
