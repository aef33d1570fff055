# 10M parameters on TinyStories.        python prepare.py tinystories && python train.py config/stlm_10m.py
# On a GPU, where wide bytes cost little, --window=0 --learning_rate=0.004 --n_layer=5 --d_byte=256 --n_ngram=156_776 does better
# (README.md).
out_dir = "out/stlm_10m"
dataset = "tinystories"  # --dataset=stdlib needs no download
max_iters = 20_000  # about 330 MB of text

block_size = 2048
max_patches = 0
n_layer = 4
n_head = 5
n_embd = 320
window = 64  # as in quick.py
d_byte = 160
n_ngram = 274_400  # rows: nearly half of the parameters. 7 layers and 53,700 rows: 7% worse after 20 minutes on two cores

batch_size = 8
learning_rate = 0.0042  # after 20 minutes of novels, 50 MB, in steps of 4 rows 0.7% better than 0.006, after 6 MB worse
adam_learning_rate = 0.006
eval_interval = 1000
