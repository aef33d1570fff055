# 10M parameters on TinyStories.        python prepare.py tinystories && python train.py config/stlm_10m.py
out_dir = "out/stlm_10m"
dataset = "tinystories"  # --dataset=stdlib needs no download
max_iters = 20_000  # about 330 MB of text

block_size = 1024
max_patches = 0
n_layer = 7
n_head = 5
n_embd = 320
d_byte = 160
n_ngram = 53_700  # instead of a second byte layer in the decoder: 0.3% better after 4.5 MB, and faster

batch_size = 16
eval_interval = 1000
