# The baseline of stlm_10m: a GPT of the same total size over GPT-2's vocabulary.
#        python prepare.py tinystories --tokenizer=gpt2 && python train.py config/gpt_10m.py
out_dir = "out/gpt_10m"
model = "gpt"
dataset = "tinystories"
tokenizer = "gpt2"
max_iters = 20_000

block_size = 512  # tokens, of about 4 bytes
n_layer = 6
n_head = 5
n_embd = 160

batch_size = 8
eval_interval = 1000
