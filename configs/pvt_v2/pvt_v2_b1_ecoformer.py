r"""PVTv2-B1 with EcoFormer attention, stage 2.

Recipe: the released one; from the weights of pvt_v2_b1_msa.py.
Expected: 78.38 % top-1 on ImageNet, as published for EcoFormer.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main --config configs/pvt_v2/pvt_v2_b1_ecoformer.py \
        --data-path IMAGENET --finetune runs/pvt_v2_b1_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage.py"

model = "pvt_v2_b1"
