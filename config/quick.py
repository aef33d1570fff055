# A tiny model of Python source in 4 minutes on two CPU cores. The data is the source of the running Python's standard
# library: nothing is downloaded.        python train.py config/quick.py
out_dir = "out/quick"
dataset = "stdlib"
max_iters = 0
max_minutes = 3.6

block_size = 512
max_patches = 0
n_layer = 4
n_head = 3
n_embd = 192
d_byte = 128
n_ngram = 1024

batch_size = 8
