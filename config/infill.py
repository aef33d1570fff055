"""
Fill in the middle (arXiv 2207.14255): half of the rows begin with a text turned around. It is read
as a mark, what comes after a gap, a mark, what comes before it and the middle, a separator (order
SPM: a middle directly follows its prefix). No window, so that patches see across a gap.

    python train.py config/infill.py
    python train.py config/quick.py --out_dir=out/plain --block_size=1024 --window=0 --batch_size=8
    python bench.py val out/infill out/plain data/stdlib              # is it free?
    python -m config.infill data/stdlib                               # bits per byte of middles
    python -m config.infill "def add(a, b):" "return total"           # fills a gap
"""
import sys

import numpy as np
import torch

from config.quick import *
from prepare import SEPARATOR, encode, printable
from sample import load, write

AFTER, BEFORE, END = b"\xfc", b"\xfd", b"\xff"  # the marks: UTF-8 has no such bytes
out_dir = "out/infill"
block_size = 1024
batch_size = 8
window = 0


def turn(row, place, stop):  # (N + 1,): the first stop symbols around place; the last four go
    text = bytes((row % 256).tolist())
    text = END + AFTER + text[place:stop] + BEFORE + text[:place] + END + text[stop:-4]
    symbols = torch.from_numpy(encode(text).astype("int64"))  # cut as a prompt will be
    return symbols.where(symbols != END[0], SEPARATOR)


def loss(model, x, y):
    rows = torch.cat([x[:, :1], y], dim=1)  # (B, N + 1)
    for i in (torch.rand(len(rows)) < 0.5).nonzero()[:, 0].tolist():
        place, stop = (1 + torch.randperm(x.size(1) - 3)[:2]).sort().values.tolist()
        rows[i] = turn(rows[i], place, stop)
    y = rows[:, 1:]  # where the text after a gap stops is chance
    return model(rows[:, :-1], y.where(y % 256 != BEFORE[0], -100))


@torch.no_grad()
def score(model, ids):
    nats, half = [], model.config.block_size // 2  # of 64 bytes, without and with what comes after
    for row in torch.from_numpy(ids.astype("int64")).split(2 * half + 1)[:-1]:  # the last is short
        for x in row[:half], turn(row, half, 2 * half - 3)[:-1]:
            nats.append(model(x[None, :-1], x[None, 1:], reduction="none")[-65:-1].sum().item())
    return np.reshape(nats, (-1, 2)).mean(0) / 64 / np.log(2)


if __name__ == "__main__":
    model, texts = load(out_dir), sys.argv[1:]
    if len(texts) == 1:
        without, given = score(model, np.fromfile(f"{texts[0]}/val.bin", np.uint16))
        print(f"{without:.4f} bits per byte of middles, {given:.4f} with what comes after")
    else:
        prompt = AFTER + texts[1].encode()[:400] + BEFORE + texts[0].encode()[-400:]
        print(printable(f"{texts[0]}[{write(model, prompt, temperature=0.5)}]{texts[1]}"))
