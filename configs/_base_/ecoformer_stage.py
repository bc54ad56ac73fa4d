"""Stage 2 as released for PVTv2: the softmax model becomes EcoFormer; the rates are stage 1's."""

_base_ = "./softmax_stage.py"

attn_type = "ecoformer"
epochs = 30
