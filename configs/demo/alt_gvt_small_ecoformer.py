"""Twins-SVT-S with EcoFormer attention on digits, from alt_gvt_small_msa.py: stage 2 of the demo.

Recipe: ours, for two CPU cores.
Expected: within 1 point of stage 1; the demo fails below that.
Command, on a CPU:
    make demo BACKBONE=twins
"""

_base_ = "../_base_/demo.py"

model = "alt_gvt_small"
attn_type = "ecoformer"
epochs = 4
lr = 8e-4
warmup_lr = 5e-5
input_size = 48
