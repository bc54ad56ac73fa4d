"""What all stages of the demo share: small images of digits, which must not be flipped."""

data_set = "IMNET"
input_size = 64
batch_size = 32
num_workers = 2
repeated_aug = False
scale = (0.7, 1.0)
hflip = 0.0
aa = None
color_jitter = 0.0
reprob = 0.0
mixup = 0.0
cutmix = 0.0
drop_path = 0.0
min_lr = 1e-5
warmup_epochs = 1
