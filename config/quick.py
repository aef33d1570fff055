# A tiny model of Python source in 4 minutes on two CPU cores; the data is the source of the running Python's standard
# library, so nothing is downloaded.        python train.py config/quick.py
out_dir = "out/quick"
dataset = "stdlib"
max_iters = 0
max_minutes = 3.75  # compilation and evaluation take the rest of the 4

block_size = 4096  # rows of 2,048 bytes are 0.5% worse after 24 MB, of 1,024 another 0.8%
max_patches = 0
n_layer = 1  # in so short a time: the parameters of a second layer do more as rows of n-grams
n_head = 3
n_embd = 192
attend_twice = True  # 1% better after 8 MB, for an eighth of the time
window = 64  # the last 64 to 128 patches: in rows of 2,048 as good as all of their 400, and a tenth faster
d_byte = 160  # 128 and 83,900 rows are a seventh faster and 0.5% worse after 24 MB
n_decoder = 1
n_ngram = 69_740  # rows: more than half of the parameters, but looked up, so nearly free in time

batch_size = 2  # twice as many are a tenth faster and 0.9% worse from the same text
learning_rate = 0.0055  # best of 0.008, 0.0055 and 0.004 after 24 MB
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
