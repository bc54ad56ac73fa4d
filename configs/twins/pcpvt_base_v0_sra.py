r"""Twins-PCPVT-B as its authors made it, with spatial reduction attention.

Recipe: the one of the Twins paper; from nothing, 300 epochs.
Expected: 82.7 % top-1 on ImageNet, as published for Twins.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/pcpvt_base_v0_sra.py \
        --data-path IMAGENET
"""

model = "pcpvt_base_v0"
attn_type = "sra"
batch_size = 128
