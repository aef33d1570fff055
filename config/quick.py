# A tiny model of Python source in 4 minutes on two CPU cores. It learns from the source of Python's
# standard library, so nothing is downloaded.        python train.py config/quick.py
out_dir = "out/quick"
dataset = "stdlib"
max_iters = 0  # no limit but max_minutes
max_minutes = 3.75  # compilation and evaluation take the rest of the 4

block_size = 4096
max_patches = 0  # as many as the data need
n_layer = 1  # up to an hour of two cores, parameters do more as n-grams than as a second layer
n_head = 3
n_embd = 192
attend_twice = True
window = 64  # a patch sees at least the last 64, at most the last 128
d_byte = 160
n_decoder = 1
n_ngram = 64_970  # half of the parameters, but looked up, so nearly free in time

batch_size = 2
learning_rate = 0.0055  # how the rates were chosen: config/README.md
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
