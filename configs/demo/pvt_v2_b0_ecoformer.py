"""PVTv2-B0 with EcoFormer attention on digits, from pvt_v2_b0_msa.py: stage 2 of the demo.

Recipe: ours, for two CPU cores.
Expected: within 1 point of stage 1; the demo fails below that.
Command, on a CPU:
    make demo
"""

_base_ = "../_base_/demo.py"

model = "pvt_v2_b0"
attn_type = "ecoformer"
epochs = 4
lr = 1.6e-3
warmup_lr = 5e-5
