"""
Blocks that share weights, the other tying of "Super Tiny Language Models" (arXiv 2405.14159): two
blocks with one MLP, or with one set of all weights. What that saves goes into rows of the n-gram
table, so every variant has the 2,093,888 parameters of quick.py.

    SHARE=mlp python train.py config/share.py
    SHARE=all python train.py config/share.py
    SHARE=none python train.py config/share.py    # control: two blocks of their own
    python train.py config/quick.py               # control: one block
"""
import os

from config.quick import *

SHARE = os.environ.get("SHARE", "mlp")
out_dir = f"out/share_{SHARE}"
n_layer = 2
n_ngram = {"none": 37_322, "mlp": 55_754, "all": 64_970}[SHARE]  # an MLP is as large as 18,432 rows


def edit(model):
    first = model.blocks[0]
    for block in model.blocks[1:]:
        if SHARE != "none":
            block.mlp = first.mlp
        if SHARE == "all":  # not the Attention itself: generation keeps keys and values for each
            block.attn.qkv = first.attn.qkv
            block.attn.out = first.attn.out
