"""PVTv2-B0 with softmax attention on digits, from nothing: stage 1 of the demo.

Recipe: ours, for two CPU cores.
Expected: 98.6 % top-1 on 360 held-out digits (seed 0, one run; at least 97 % is required).
Command, on a CPU:
    make demo
"""

_base_ = "./_base_.py"

model = "pvt_v2_b0"
attn_type = "msa"
epochs = 8
lr = 1.2e-2
warmup_lr = 2e-4
