# A baseline of quick.py on the novels: a GPT of the same total size over a BPE of 4,096 tokens.
#        python train.py config/gpt_bpe4096_2m.py
out_dir = "out/gpt_bpe4096_2m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 15

block_size = 149  # tokens, about 512 bytes
n_layer = 3
n_head = 4
n_embd = 192

batch_size = 16
learning_rate = 0.01
adam_learning_rate = 0.006
eval_interval = 800
log_interval = 50
