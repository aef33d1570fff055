"""
MoEfication (arXiv 2110.01786): at most positions most neurons of a trained ReLU^2 MLP give zero.
Neurons with similar input weights fire together: such groups become E experts, and a linear router
picks K of them for each position. (Here the others are computed, too, and then left out.)

    python train.py config/quick.py && python -m config.experts
    K=4 python train.py config/experts.py    # two minutes of finetuning; K=16 is the dense MLP
"""
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from config.quick import *

E, K, RANDOM = 16, int(os.environ.get("K", 4)), False  # RANDOM groups are the control
init_from = "out/quick/best.pt"
out_dir = f"out/experts_{K}"
max_minutes = 2.0
learning_rate = 0.0025
adam_learning_rate = 0.001


class Experts(nn.Module):
    def __init__(self, mlp, order):
        super().__init__()
        self.up, self.down = mlp.up, mlp.down
        self.up.weight.data = mlp.up.weight.data[order]  # the neurons of one expert after another
        self.down.weight.data = mlp.down.weight.data[:, order]
        self.router = nn.Linear(mlp.up.in_features, E, bias=False)
        self.router.weight.data = self.up.weight.data.unflatten(0, (E, -1)).mean(1)

    def forward(self, x):                                       # (B, P, n_embd)
        p = self.router(x).softmax(-1)                          # (B, P, E)
        chosen = torch.zeros_like(p).scatter(-1, p.topk(K).indices, 1)
        gate = chosen + p - p.detach()  # 0 or 1, but with the gradient of p: the router learns
        h = F.relu(self.up(x)).square().unflatten(-1, (E, -1))  # (B, P, E, neurons / E)
        return self.down((h * gate[..., None]).flatten(-2))


def group(rows):
    """The neurons, expert by expert, by k-means of their input weights (neurons, n_embd), in which
    each expert in turn takes the nearest that are left."""
    rows, order = F.normalize(rows), torch.arange(len(rows))
    for _ in range(20):
        centers = rows[order].unflatten(0, (E, -1)).mean(1)     # (E, n_embd)
        near = rows @ F.normalize(centers).T                    # (neurons, E)
        for e in range(E):
            taken = near[:, e].topk(len(rows) // E).indices
            near[taken] = -torch.inf
            order[e * len(taken) : (e + 1) * len(taken)] = taken
    return order


def edit(model):
    for block in model.blocks:
        rows = block.mlp.up.weight.data
        block.mlp = Experts(block.mlp, torch.randperm(len(rows)) if RANDOM else group(rows))


if __name__ == "__main__":
    for RANDOM, K in [(random, k) for random in (False, True) for k in (16, 8, 4, 2)]:
        model, checkpoint = train.load_checkpoint(init_from)
        edit(model)
        val = train.Data(Path("data/stdlib"), "val", checkpoint["data"], block_size)
        bpb = train.evaluate(model, val, batch_size, torch.autocast("cpu", enabled=False))
        print(f"{'random' if RANDOM else 'similar'} groups, {K / E:.0%} of the neurons: {bpb:.4f}")
