# A tiny model of Python source in 4 minutes on two CPU cores; the data is the source of the running Python's standard
# library, so nothing is downloaded.        python train.py config/quick.py
out_dir = "out/quick"
dataset = "stdlib"
max_iters = 0
max_minutes = 3.75  # compilation and evaluation take the rest of the 4

block_size = 512
max_patches = 0
n_layer = 2  # in so short a time a small core that sees more text beats a deeper one
n_head = 3
n_embd = 192
d_byte = 128
n_ngram = 8192  # a third of the parameters, but looked up, so nearly free in time

batch_size = 16
learning_rate = 0.008  # 0.015 is 0.5% worse, 0.03 by 2%
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
