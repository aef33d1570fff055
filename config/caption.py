"""
eP-ALM (arXiv 2303.11403): a trained model of text stays frozen and names pictures, scikit-learn's
digits of 8x8 pixels. What is trained, 0.5% of the parameters, is a linear projection of the pixels
and a vector; both are added to what the bytes of the word receive from the transformer.

    pip install scikit-learn && python train.py config/quick.py && python train.py config/caption.py
    python -m config.caption    # how many of the pictures held out are named right; the control
"""
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

from config.quick import *
from model import SEPARATOR
from prepare import encode
from sample import load

WORDS = [torch.from_numpy(encode(f"{word} ".encode()).astype("int64")) for word in
         "zero one two three four five six seven eight nine".split()]
init_from = "out/quick/best.pt"
out_dir = "out/caption"
max_iters = 2000
learning_rate = 0.05
adam_learning_rate = 0.02
eval_interval = 1_000_000  # only at the end: without a picture nothing changes
compile = False  # rows of six bytes


def edit(model):
    def add_picture(layer, inputs, received):  # (B, P, d_byte)
        return received if model.pixels is None else received + model.see(model.pixels)[:, None]

    model.requires_grad_(False)
    model.see, model.pixels = nn.Linear(64, model.config.d_byte), None
    model.to_bytes.register_forward_hook(add_picture)


@lru_cache
def digits(held_out):
    """Every fifth of the pictures (n, 64) or the others, and the digits that they show (n,)."""
    from sklearn.datasets import load_digits
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    rows = (torch.arange(len(labels)) % 5 == 0) == held_out
    return pixels[rows].float() / 16, labels[rows]


def nats(model, pixels, labels):
    """Of the words for labels (n,), each with its picture, pixels (n, 64) or None: (n,)."""
    y = nn.utils.rnn.pad_sequence(WORDS, batch_first=True, padding_value=-100)[labels]  # (n, 6)
    x = F.pad(y[:, :-1], (1, 0), value=SEPARATOR).clamp(min=0)
    model.pixels = pixels
    loss = model(x, y, reduction="none").view(y.shape).sum(1)
    model.pixels = None
    return loss


def loss(model, x, y):
    pixels, labels = (part.to(x.device) for part in digits(held_out=False))
    rows = torch.randint(len(labels), (64,), device=x.device)
    return nats(model, pixels[rows], labels[rows]).mean()


if __name__ == "__main__":
    model = load(__file__, "cpu")
    pixels, labels = digits(held_out=True)
    for name, shown in ("with", pixels), ("without", None):
        with torch.no_grad():
            each = [nats(model, shown, torch.full_like(labels, digit)) for digit in range(10)]
        right = (torch.stack(each).argmin(0) == labels).float().mean()
        print(f"{name} the picture {right:.1%} of {len(labels)} are named right")
