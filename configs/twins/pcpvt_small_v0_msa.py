r"""Twins-PCPVT-S with full softmax attention, stage 1.

Recipe: the released one of Twins-SVT-S; from original Twins weights.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/pcpvt_small_v0_msa.py \
        --data-path IMAGENET --finetune TWINS_WEIGHTS
"""

_base_ = "../_base_/softmax_stage.py"

model = "pcpvt_small_v0"
