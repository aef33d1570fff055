# A tiny model of Python source in 4 minutes on two CPU cores; the data is the source of the running Python's standard
# library, so nothing is downloaded.        python train.py config/quick.py
out_dir = "out/quick"
dataset = "stdlib"
max_iters = 0
max_minutes = 3.75  # compilation and evaluation take the rest of the 4

block_size = 1024  # 512 bytes are 1% faster and clearly worse, 2,048 are 7% slower
max_patches = 0
n_layer = 1  # in so short a time: the parameters of a second layer do more as rows of n-grams
n_head = 3
n_embd = 192
attend_twice = True  # 1% better after 8 MB, for an eighth of the time
d_byte = 128
n_decoder = 1
n_ngram = 83_900  # rows: half of the parameters, but looked up, so nearly free in time

batch_size = 8  # 16 rows are a twentieth faster and 0.1% worse from the same text
learning_rate = 0.008
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
