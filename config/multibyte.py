"""
Several symbols ahead (arXiv 2404.19737): beside the next symbol, small matrices on the decoder's
output predict the second, third and fourth. They only help to learn: what is judged is the next
byte. By the curriculum of arXiv 2505.22757 they leave one by one (reverse) or come one by one.

    ORDER=reverse python train.py config/multibyte.py    # or forward
    ORDER=none python train.py config/multibyte.py       # the control: the next symbol only

The result is the last "val" of each; "train" adds up the losses of all in use.
"""
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from config.quick import *

ORDER = os.environ.get("ORDER", "reverse")
AHEAD = 3    # how many symbols after the next one
STAGE = 75   # steps after which one of them leaves or comes
out_dir = f"out/multibyte_{ORDER}"


def edit(model):
    d = model.config.d_byte
    model.ahead = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(AHEAD))
    for matrix in model.ahead:
        nn.init.zeros_(matrix.weight)  # at first each predicts what the model does
    model.register_buffer("steps", torch.tensor(0))
    model.decoder.register_forward_hook(keep_output)


def keep_output(decoder, inputs, output):
    decoder.output = output  # (B * N, d_byte)


def loss(model, x, y):
    total = model(x, y)
    z = model.decoder.output.view(*y.shape, -1)  # (B, N, d_byte)
    stage = min(AHEAD, int(model.steps) // STAGE)
    n_used = {"reverse": AHEAD - stage, "forward": stage, "none": 0}[ORDER]
    for i, matrix in enumerate(model.ahead[:n_used], start=1):
        logits = F.linear(z + matrix(z), model.embed.byte.weight)[:, :-i]  # (B, N - i, 512)
        total = total + F.cross_entropy(logits.flatten(0, 1).float(), y[:, i:].flatten())
    model.steps += 1
    return total
