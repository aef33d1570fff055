# A baseline of stlm_50m on the novels: a GPT of the same total size over a BPE of 8,192 tokens.
#        python train.py config/gpt_bpe8192_50m.py
out_dir = "out/gpt_bpe8192_50m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "bpe:8192"
max_iters = 0
max_minutes = 0.5  # on one NVIDIA H200

block_size = 546  # tokens, about 2,048 bytes
n_layer = 9
n_head = 10
n_embd = 640

batch_size = 32
learning_rate = 0.02
eval_interval = 2000
eval_bytes = 2_000_000
