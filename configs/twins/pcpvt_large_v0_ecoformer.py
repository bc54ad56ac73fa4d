r"""Twins-PCPVT-L with EcoFormer attention, stage 2.

Recipe: the released one of Twins-SVT-S; from the weights of pcpvt_large_v0_msa.py.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/pcpvt_large_v0_ecoformer.py \
        --data-path IMAGENET --finetune runs/pcpvt_large_v0_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage_twins.py"

model = "pcpvt_large_v0"
