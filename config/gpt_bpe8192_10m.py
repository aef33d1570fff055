# A baseline of stlm_10m on the novels: a GPT of the same total size over a BPE of 8,192 tokens.
#        python train.py config/gpt_bpe8192_10m.py
out_dir = "out/gpt_bpe8192_10m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "bpe:8192"
max_iters = 0
max_minutes = 20

block_size = 544  # tokens, about 2,048 bytes
window = 68  # a token sees at least the last 68
n_layer = 6
n_head = 5
n_embd = 320

batch_size = 4
learning_rate = 0.01
eval_interval = 500
