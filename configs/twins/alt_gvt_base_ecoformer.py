r"""Twins-SVT-B with EcoFormer attention, stage 2.

Recipe: the released one of the small model; from the weights of alt_gvt_base_msa.py.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/alt_gvt_base_ecoformer.py \
        --data-path IMAGENET --finetune runs/alt_gvt_base_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage_twins.py"

model = "alt_gvt_base"
