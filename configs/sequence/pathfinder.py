r"""Pathfinder: are two dots the ends of one dashed contour, in 32 x 32 grey values as 1,024 tokens?

Recipe: the open harness of Skyformer, arXiv 2111.00035: 50,000 steps of 128 images, the rate from
2e-4 to 0 in a line after 500 steps of warm-up (312 there), measured every 500 steps.
Expected, published for its own files, top-1 %: softmax 65.26, Performer 66.30, Reformer 66.49,
Linformer 60.93, Nystromformer 69.48.
Command, for each --attn_type of msa, msa_share_qk, performer, ecoformer:
    ecoformer train --config configs/sequence/pathfinder.py --attn_type ecoformer \
        --output_dir runs/pathfinder_ecoformer
"""

task = "sequence"
data_set = "PATHFINDER"
max_tokens = 1024
batch_size = 128
# 500 steps.
epoch_samples = 64000
epochs = 100
warmup_epochs = 1
# 2e-4 for 128 images.
lr = 8e-4
