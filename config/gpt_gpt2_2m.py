# A baseline of quick.py on the novels: a GPT of the same total size over GPT-2's vocabulary.
#        python train.py config/gpt_gpt2_2m.py
out_dir = "out/gpt_gpt2_2m"
model = "gpt"
dataset = "novels"  # how to prepare it: config/README.md
tokenizer = "gpt2"
max_iters = 0
max_minutes = 15

block_size = 128  # tokens, about 512 bytes
n_layer = 4
n_head = 2
n_embd = 40

batch_size = 16
learning_rate = 0.0075
adam_learning_rate = 0.006
eval_interval = 800
log_interval = 50
