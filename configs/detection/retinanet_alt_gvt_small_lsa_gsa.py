r"""RetinaNet over Twins-SVT-S as its authors made it, on COCO.

Recipe: PVTv2's, 12 epochs of 16 images, AdamW at 1e-4, a tenth of it after 8 epochs and again
after 11. Its warm-up of 500 steps is left out: rates change between epochs here.
Expected: nothing was measured here.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m twins.main \
        --config configs/detection/retinanet_alt_gvt_small_lsa_gsa.py \
        --data-path COCO --finetune alt_gvt_small.pth
"""

_base_ = "../_base_/retinanet.py"

model = "alt_gvt_small"
attn_type = "lsa_gsa"
