# The rival of quick: a base transformer with a BPE of 4,096 tokens trained on the same text, the same total size.
#        pip install tokenizers && python train.py config/gpt_quick.py
out_dir = "out/gpt_quick"
model = "gpt"
dataset = "stdlib"
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 3.75

block_size = 160  # tokens, of 3.3 bytes
n_layer = 5
n_head = 3
n_embd = 156

batch_size = 16
learning_rate = 0.015  # its best of 0.03, 0.015 and 0.008
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
