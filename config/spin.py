"""
Self-play on text, SPIN (arXiv 2401.01335): a trained model learns to prefer the real second half of
a piece of text to the one that its previous self wrote. The loss is logistic, of the difference of
two log-ratios of probabilities, new self to previous. Both begin as init_from below.

    python train.py config/quick.py && python train.py config/spin.py
    SPIN=0 python train.py config/spin.py                           # control: goes on as before
    python train.py config/quick.py --seed=2 --out_dir=out/judge    # a model that takes no part
    python -m config.spin    # can the judge tell written text from real? An AUC of 0.5 = by chance
"""
import os
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from config.quick import *
from sample import load

SPIN = int(os.environ.get("SPIN", 1))
BETA = 0.1  # scales the log-ratios
previous_self = lru_cache(load)
init_from = "out/quick/best.pt"
out_dir = f"out/spin_{SPIN}"
learning_rate = 0.0001
adam_learning_rate = 0.00004
eval_interval = 50
compile = False  # without y the shapes depend on the data


def rewrite(writer, pieces):  # (R, L) to the same with a second half that the writer wrote
    prompts, real = pieces.chunk(2, dim=1)
    return torch.cat([prompts, writer.generate(prompts, real.size(1))], dim=1)


def log_prob(model, pieces):  # (R, L) to (R,): of the second half after the first, in nats
    second = pieces[:, pieces.size(1) // 2 :, None]                    # (R, L / 2, 1)
    logits = model(pieces[:, :-1])[:, -second.size(1) :]               # (R, L / 2, 512)
    return logits.float().log_softmax(-1).gather(2, second).sum((1, 2))


def loss(model, x, y):
    if not SPIN:
        return model(x, y)
    real = x.unflatten(1, (16, -1)).flatten(0, 1)                      # (B * 16, N / 16)
    with torch.no_grad():
        previous = previous_self(init_from, str(x.device), real.size(1))
        both = torch.cat([real, rewrite(previous, real)])
        before = log_prob(previous, both)
    real_ratio, written_ratio = (log_prob(model, both) - before).chunk(2)
    return -F.logsigmoid(BETA * (real_ratio - written_ratio)).mean()


if __name__ == "__main__":
    ids = torch.from_numpy(np.fromfile("data/stdlib/val.bin", np.uint16).astype(np.int64))
    real, judge = torch.stack(ids.split(256)[:-1][:500]), load("out/judge", "cpu", 256)
    for path in "out/quick", "out/spin_1/ckpt.pt", "out/spin_0/ckpt.pt":
        torch.manual_seed(1)
        written = rewrite(load(path, "cpu", 256), real)
        with torch.no_grad():
            a, b = (-log_prob(judge, pieces) for pieces in (real, written))
        print(f"{path}: AUC {(b[:, None] > a).float().mean():.3f}")
