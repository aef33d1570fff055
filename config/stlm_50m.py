# 50M parameters on a sample of FineWeb-Edu.
#        python prepare.py fineweb-edu && python train.py config/stlm_50m.py
out_dir = "out/stlm_50m"
dataset = "fineweb-edu"  # --dataset=stdlib needs no download
max_iters = 60_000  # about 4 GB of text

block_size = 2048
max_patches = 0  # as many as the data need
n_layer = 7
n_head = 10
n_embd = 640
d_byte = 320
n_ngram = 836_880  # a quarter of the parameters

batch_size = 32
learning_rate = 0.01
eval_interval = 2000
eval_bytes = 2_000_000
