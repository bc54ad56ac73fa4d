r"""RetinaNet over PVTv2-B0 with EcoFormer attention, from its classifier, on COCO.

Recipe: PVTv2's, 12 epochs of 16 images, AdamW at 1e-4, a tenth of it after 8 epochs and again
after 11. Its warm-up of 500 steps is left out: rates change between epochs here.
Expected: nothing is published, and nothing was measured here. The original:
retinanet_pvt_v2_b0_sra.py.
Command, on 8 GPUs:
    torchrun --nproc_per_node=8 -m pvt.main \
        --config configs/detection/retinanet_pvt_v2_b0_ecoformer.py \
        --data-path COCO --finetune runs/pvt_v2_b0_ecoformer/best_checkpoint.pth
"""

_base_ = "../_base_/retinanet.py"

model = "pvt_v2_b0"
attn_type = "ecoformer"
