# The baseline of quick.py: a GPT of the same total size over a BPE of 4,096 tokens.
#        pip install tokenizers && python train.py config/gpt_quick.py
out_dir = "out/gpt_quick"
model = "gpt"
dataset = "stdlib"
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 3.75

block_size = 160  # tokens, of about 3.3 bytes
n_layer = 3
n_head = 4
n_embd = 192

batch_size = 16
learning_rate = 0.015
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
