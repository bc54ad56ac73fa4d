r"""ListOps in little: sequences of up to 100 tokens, in which a CPU sees kinds learn in minutes.

Recipe: that of configs/sequence/listops.py, but for a rate of 1e-3 and 2,000 steps.
Expected: .github/results/sequences.md.
Command, for all kinds and three seeds:
    ecoformer tables sequences --data-set LISTOPS --configs configs/sequence/short \
        --epochs 4 --steps 500
"""

_base_ = "../listops.py"

max_tokens = 100
# 1e-3 for 32 sequences.
lr = 1.6e-2
