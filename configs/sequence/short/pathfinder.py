r"""Pathfinder in a quarter of its batch, for a CPU.

Recipe: that of configs/sequence/pathfinder.py, but for 32 images a step at a rate of 1e-3.
Expected: .github/results/sequences.md.
Command, for all kinds and three seeds:
    ecoformer tables sequences --data-set PATHFINDER --configs configs/sequence/short \
        --epochs 2 --steps 75 --eval-samples 500
"""

_base_ = "../pathfinder.py"

batch_size = 32
# 1e-3 for 32 images.
lr = 1.6e-2
