# The baseline of stlm_100m: a GPT of the same total size over GPT-2's vocabulary.
#        python prepare.py fineweb-edu --tokenizer=gpt2 && python train.py config/gpt_100m.py
out_dir = "out/gpt_100m"
model = "gpt"
dataset = "fineweb-edu"
tokenizer = "gpt2"
max_iters = 60_000

block_size = 512  # tokens, of about 4 bytes
n_layer = 9
n_head = 12
n_embd = 768

batch_size = 32
eval_interval = 2000
eval_bytes = 2_000_000
