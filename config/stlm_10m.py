# 10M parameters on TinyStories. On a GPU other sizes do better: config/README.md.
#        python prepare.py tinystories && python train.py config/stlm_10m.py
out_dir = "out/stlm_10m"
dataset = "tinystories"  # --dataset=stdlib needs no download
max_iters = 20_000  # about 330 MB of text

block_size = 2048
max_patches = 0  # as many as the data need
n_layer = 4  # up to an hour of two cores, parameters do more as n-grams than as more layers
n_head = 5
n_embd = 320
window = 64  # a patch sees at least the last 64, at most the last 128
d_byte = 160
n_ngram = 273_440  # nearly half of the parameters, but looked up, so nearly free in time

batch_size = 8
learning_rate = 0.0042
adam_learning_rate = 0.006
eval_interval = 1000
