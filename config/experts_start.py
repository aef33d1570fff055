"""
Mixture of experts (arXiv 2109.10465): each block has E MLPs, and a router sends each position to
one, so the model has more parameters but computes as much. A second loss keeps the experts equally
busy. experts.py splits an MLP after its training instead.

    python train.py config/experts_start.py
    python train.py config/quick.py                                             # control: one MLP
    python train.py config/quick.py --n_ngram=120314 --out_dir=out/quick_rows   # as many parameters
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from config.quick import *
from model import MLP, init_weights

E = 4
out_dir = "out/experts_start"


class Experts(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.router = nn.Linear(n, E, bias=False)
        self.mlps = nn.ModuleList(MLP(n, hidden) for _ in range(E))
        init_weights(self)

    @torch.compiler.disable  # how many positions an expert has depends on the data
    def forward(self, x):
        flat = x.flatten(0, -2)                                 # (M, n_embd), M positions
        p = self.router(flat).float().softmax(-1)               # (M, E)
        best, chosen = p.max(-1)                                # (M,), (M,)
        share = F.one_hot(chosen, E).float().mean(0)            # (E,) of the positions
        self.imbalance = E * (share * p.mean(0)).sum()          # 1 if all have as many
        out = torch.zeros_like(flat)
        for e, mlp in enumerate(self.mlps):
            rows = (chosen == e).nonzero()[:, 0]
            y = best[rows, None] * mlp(flat[rows])  # times p, so that the router learns
            out = out.index_add(0, rows, y.to(out.dtype))
        return out.view_as(x)


def edit(model):
    for block in model.blocks:
        block.mlp = Experts(block.mlp.up.in_features, block.mlp.up.out_features)


def loss(model, x, y):
    nats = model(x, y)
    return nats + 0.01 * sum(m.imbalance for m in model.modules() if isinstance(m, Experts))
