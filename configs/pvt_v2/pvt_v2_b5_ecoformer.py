r"""PVTv2-B5 with EcoFormer attention, stage 2.

Recipe: the released one of the smaller models; from the weights of pvt_v2_b5_msa.py.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main --config configs/pvt_v2/pvt_v2_b5_ecoformer.py \
        --data-path IMAGENET --finetune runs/pvt_v2_b5_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage.py"

model = "pvt_v2_b5"
