r"""ListOps: what do nested MIN, MAX, MED and SM of up to 2,000 tokens evaluate to?

Recipe: the open harness of Skyformer, arXiv 2111.00035: 50,000 steps of 32 sequences, the rate
from 1e-4 to 0 in a line after 1,000 steps of warm-up, measured every 500 steps.
Expected, published for its own files of unbalanced classes, top-1 %: softmax 38.37, Performer
38.02, Reformer 37.68, Linformer 37.45, Nystromformer 38.51.
Command, for each --attn_type of msa, msa_share_qk, performer, ecoformer:
    ecoformer train --config configs/sequence/listops.py --attn_type ecoformer \
        --output_dir runs/listops_ecoformer
"""

task = "sequence"
data_set = "LISTOPS"
batch_size = 32
# 500 steps.
epoch_samples = 16000
epochs = 100
warmup_epochs = 2
# 1e-4 for 32 sequences.
lr = 1.6e-3
