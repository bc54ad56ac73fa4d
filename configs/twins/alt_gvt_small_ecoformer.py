r"""Twins-SVT-S with EcoFormer attention, stage 2.

Recipe: the released one; from the weights of alt_gvt_small_msa.py.
Expected: 80.22 % top-1 on ImageNet, as published for EcoFormer.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/alt_gvt_small_ecoformer.py \
        --data-path IMAGENET --finetune runs/alt_gvt_small_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage_twins.py"

model = "alt_gvt_small"
