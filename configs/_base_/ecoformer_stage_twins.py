"""Stage 2 as released for Twins: five times the rates of PVTv2."""

_base_ = "./ecoformer_stage.py"

lr = 25e-5
warmup_lr = 5e-7
