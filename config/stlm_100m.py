# 100M parameters on a sample of FineWeb-Edu.
#        python prepare.py fineweb-edu && python train.py config/stlm_100m.py
out_dir = "out/stlm_100m"
dataset = "fineweb-edu"  # --dataset=stdlib needs no download
max_iters = 60_000  # about 4 GB of text

block_size = 2048
max_patches = 0  # as many as the data need
n_layer = 13
n_head = 12
n_embd = 768
d_byte = 384
n_ngram = 201_780

batch_size = 32
eval_interval = 2000
eval_bytes = 2_000_000
