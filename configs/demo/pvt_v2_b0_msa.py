"""PVTv2-B0 with softmax attention on digits, from nothing: stage 1 of the demo.

Recipe: ours, for two CPU cores.
Expected: at least 97 % top-1 on 360 held-out digits; the demo fails below that.
Command, on a CPU:
    make demo
"""

_base_ = "../_base_/demo.py"

model = "pvt_v2_b0"
attn_type = "msa"
epochs = 8
lr = 1.2e-2
warmup_lr = 2e-4
