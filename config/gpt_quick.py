# The rival of quick: a base transformer with a BPE of 4,096 tokens trained on the same text, the same total size.
#        pip install tokenizers && python train.py config/gpt_quick.py
out_dir = "out/gpt_quick"
model = "gpt"
dataset = "stdlib"
tokenizer = "bpe:4096"
max_iters = 0
max_minutes = 3.6

block_size = 128  # tokens, of about 4 bytes
n_layer = 4
n_head = 3
n_embd = 192

batch_size = 8
