r"""PVTv2-B3 with full softmax attention, stage 1.

Recipe: the released one; from original PVTv2 weights.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main --config configs/pvt_v2/pvt_v2_b3_msa.py \
        --data-path IMAGENET --finetune PVT_WEIGHTS
"""

_base_ = "../_base_/softmax_stage.py"

model = "pvt_v2_b3"
