"""
Learning from noise (after METRO, arXiv 2204.06644). Some rows of a batch get wrong bytes: what a
smaller trained model, the helper, samples there, in the input alone, so that the model learns to
read past plausible errors; or random letters in input and targets, since noisy text is scored so.
The other rows stay clean: from the errors before a byte the model can tell which kind it reads.

    python train.py config/quick.py --out_dir=out/helper --n_embd=96 --d_byte=64 --n_ngram=8192 \\
        --attend_twice=false --max_minutes=1
    MADE=0.05 python train.py config/denoise.py    # MADE=0 needs no helper; control: quick.py
    python bench.py val --noise=0.05 out/quick out/denoise_0.05 data/stdlib
"""
import os
from functools import lru_cache

import torch

from config.quick import *
from prepare import SEPARATOR, encode
from sample import load

RATE = 0.05    # of the bytes of a noisy row are replaced
LETTERS = 0.1  # share of rows with random letters
MADE = float(os.environ.get("MADE", 0.05))  # share of rows with bytes made by the helper
helper = lru_cache(load)
out_dir = f"out/denoise_{MADE}"


def loss(model, x, y):
    x, y = x.clone(), y.clone()
    for i, kind in enumerate(torch.rand(len(x)).tolist()):
        row = torch.cat([x[i, :1], y[i]])  # (N + 1,)
        if kind < LETTERS:
            noisy = replace(row, torch.randint(ord("a"), ord("z") + 1, row.shape))
            x[i], y[i] = noisy[:-1], noisy[1:]
        elif kind < LETTERS + MADE:
            x[i] = replace(row, made(row))[:-1]
    return model(x, y)


def replace(row, new):
    """A row (N + 1,) with some bytes from new (N + 1,), cut as prepare.py would cut it: with the
    old cut a letter that ends its patch would betray that a space stood there."""
    row, new = row.cpu(), new.cpu()
    raw = torch.where(torch.rand(row.shape) < RATE, new, row) % 256
    symbols = torch.from_numpy(encode(raw.byte().numpy().tobytes()).astype("int64"))
    symbols[-1] = row[-1]  # whether it ends its patch depends on what follows
    return torch.where(row == SEPARATOR, row, symbols)


@torch.no_grad()
def made(row):
    """Bytes (N + 1,) that the helper samples in their places in a row, never those of the row."""
    model = helper("out/helper", str(row.device))
    logits = model(row[None, :-1])[0].float().unflatten(1, (2, 256)).logsumexp(1)  # (N, 256)
    p = logits.scatter(1, row[1:, None] % 256, -torch.inf).softmax(1)
    return torch.cat([row[:1], torch.multinomial(p, 1)[:, 0]])
