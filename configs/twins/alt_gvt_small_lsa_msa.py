r"""Twins-SVT-S with window and full softmax attention in turn.

Recipe: that of stage 1, as released; from original Twins weights.
Expected: no figure was released.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main --config configs/twins/alt_gvt_small_lsa_msa.py \
        --data-path IMAGENET --finetune TWINS_WEIGHTS
"""

_base_ = "../_base_/softmax_stage.py"

model = "alt_gvt_small"
attn_type = "lsa_msa"
