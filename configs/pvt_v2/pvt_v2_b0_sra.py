r"""PVTv2-B0 as its authors made it, with spatial reduction attention.

Recipe: the one that PVTv2 released; from nothing, 300 epochs.
Expected: 70.5 % top-1 on ImageNet, as published for PVTv2.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main --config configs/pvt_v2/pvt_v2_b0_sra.py \
        --data-path IMAGENET
"""

model = "pvt_v2_b0"
attn_type = "sra"
batch_size = 128
