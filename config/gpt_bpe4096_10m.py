# A baseline of stlm_10m on the novels: a GPT of the same total size over a BPE of 4,096 tokens.
#        python train.py config/gpt_bpe4096_10m.py
out_dir = "out/gpt_bpe4096_10m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 20

block_size = 596  # tokens, about 2,048 bytes
window = 75  # a token sees at least the last 75
n_layer = 7
n_head = 5
n_embd = 320

batch_size = 4
learning_rate = 0.01
eval_interval = 500
