# The rival of quick: a base transformer with a BPE of 4,096 tokens trained on the same text, the same total size.
#        pip install tokenizers && python train.py config/gpt_quick.py
out_dir = "out/gpt_quick"
model = "gpt"
dataset = "stdlib"
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 3.75

block_size = 160  # tokens, of 3.3 bytes; four times as long, with window = 75, are 13% slower, 0.6% better from the same text
n_layer = 3  # 5 layers of 156 are 0.2% worse after 5 minutes of novels, 2 of 224 0.4% after 15
n_head = 4
n_embd = 192

batch_size = 16
learning_rate = 0.015  # its best of 0.03, 0.015 and 0.008
adam_learning_rate = 0.006
eval_interval = 300
log_interval = 50
