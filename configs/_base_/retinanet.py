"""RetinaNet on COCO: the task's defaults are the published schedule, "1x", for 8 ranks."""

task = "detection"
data_set = "COCO"
