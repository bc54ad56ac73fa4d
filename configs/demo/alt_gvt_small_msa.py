"""Twins-SVT-S with softmax attention on digits, from nothing: stage 1 of the demo.

Recipe: ours, for two CPU cores.
Expected: at least 97 % top-1 on 360 held-out digits; the demo fails below that.
Command, on a CPU:
    make demo BACKBONE=twins
"""

_base_ = "../_base_/demo.py"

model = "alt_gvt_small"
attn_type = "msa"
epochs = 8
lr = 6e-3
warmup_lr = 2e-4
input_size = 48
