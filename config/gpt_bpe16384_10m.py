# A baseline of stlm_10m on the novels: a GPT of the same total size over a BPE of 16,384 tokens.
#        python train.py config/gpt_bpe16384_10m.py
out_dir = "out/gpt_bpe16384_10m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "bpe:16384"
max_iters = 0
max_minutes = 20

block_size = 512  # tokens, about 2,048 bytes
window = 64  # a token sees at least the last 64
n_layer = 4
n_head = 5
n_embd = 320

batch_size = 4
learning_rate = 0.0067
eval_interval = 500
