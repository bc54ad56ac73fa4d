"""Stage 1: original weights become full softmax attention. Released for PVTv2 and Twins alike."""

attn_type = "msa"
epochs = 100
lr = 5e-5
warmup_lr = 1e-7
min_lr = 1e-6
