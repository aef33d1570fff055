"""
A trained STLM teaches one of a third of its size. Both read the same symbols, so the student learns
the teacher's whole distribution at each byte (arXiv 1503.02531), mixed with the true symbol, or, a
part of RetriKT (arXiv 2310.15594), from text that the teacher wrote.

    python train.py config/quick.py                     # the teacher
    SHARE=0.5 python train.py config/distill.py
    SHARE=0 python train.py config/distill.py           # the control: without a teacher
    python -m config.distill                            # writes 2 MB of text in some minutes
    SHARE=0 python train.py config/distill.py --dataset=written --out_dir=out/distill_written
"""
import json
import os
import sys
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from config.quick import *
from prepare import SEPARATOR, decode, prepare
from sample import load

SHARE = float(os.environ.get("SHARE", 0.5))  # of the teacher in the targets
teacher = lru_cache(load)
out_dir = f"out/distill_{SHARE}"
n_embd = 96
d_byte = 80
n_ngram = 22_000  # 0.70M parameters in all


def loss(model, x, y):
    if SHARE == 0:
        return model(x, y)
    with torch.no_grad():
        taught = teacher("out/quick", str(x.device))(x).float().softmax(-1)  # (B, N, 512)
    return model(x, SHARE * taught + (1 - SHARE) * F.one_hot(y, 512))


def save(path, ids):
    with open(path, "w") as file:
        for text in np.split(ids, np.flatnonzero(ids == SEPARATOR)):
            print(json.dumps({"text": decode(text).decode("utf-8", "replace")}), file=file)


if __name__ == "__main__":
    real, val = (np.fromfile(f"data/stdlib/{part}.bin", np.uint16) for part in ("train", "val"))
    n_texts = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    begins = np.linspace(0, len(real) - 32, n_texts).astype(int)
    prompts = torch.from_numpy(np.stack([real[i : i + 32] for i in begins]).astype(np.int64))
    writer = load("out/quick", "cpu", block_size=512)
    texts = [torch.cat([ids, writer.generate(ids, 480)], dim=1) for ids in prompts.split(256)]
    save("out/written.jsonl", F.pad(torch.cat(texts), (0, 1), value=SEPARATOR).flatten().numpy())
    save("out/val.jsonl", val)
    prepare(["out/written.jsonl"], name="written", val="out/val.jsonl")
