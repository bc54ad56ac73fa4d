"""Semantic FPN on ADE20K: with the defaults of the task the published schedule, for 8 ranks."""

task = "segmentation"
data_set = "ADE20K"
# 1,000 steps of 16, so that 80 epochs are 80,000 steps.
epoch_samples = 16000
