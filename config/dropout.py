"""
Dropout in the transformer, by a schedule: none, constant, early (only in the first half of the run)
or late (only in the second), the question of the one finished report of the Super Tiny Language
Models series (arXiv 2409.05423).

The halves are those of max_iters as this file sets it: change it here and not by --max_iters.

    SCHEDULE=early python train.py config/dropout.py    # or constant, or late
    SCHEDULE=none python train.py config/dropout.py     # the control
"""
import os

import torch

from config.quick import *

SCHEDULE = os.environ.get("SCHEDULE", "early")
P = 0.1  # the share of activations that dropout sets to zero
out_dir = f"out/dropout_{SCHEDULE}"
max_iters = 300  # equal steps: dropout costs next to no time
max_minutes = 0.0


def edit(model):
    model.register_buffer("steps", torch.tensor(0))
    model.register_buffer("p", torch.tensor(0.0))

    def dropout(layer, inputs, output):
        if not model.training:
            return output
        kept = torch.rand_like(output) >= model.p
        return output * kept / (1 - model.p)

    for block in model.blocks:
        block.attn.register_forward_hook(dropout)
        block.mlp.register_forward_hook(dropout)


def loss(model, x, y):
    late = int(model.steps) >= max_iters // 2
    active = {"none": False, "constant": True, "early": not late, "late": late}[SCHEDULE]
    model.p.fill_(P if active else 0)
    model.steps += 1
    return model(x, y)
