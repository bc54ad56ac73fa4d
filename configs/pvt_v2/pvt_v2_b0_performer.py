r"""PVTv2-B0 with Performer attention, to compare with EcoFormer.

Recipe: that of the EcoFormer stage; from the weights of pvt_v2_b0_msa.py.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main --config configs/pvt_v2/pvt_v2_b0_performer.py \
        --data-path IMAGENET --finetune runs/pvt_v2_b0_msa/best_checkpoint.pth
"""

_base_ = "../_base_/ecoformer_stage.py"

model = "pvt_v2_b0"
attn_type = "performer"
