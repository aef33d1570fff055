"""
STLM, a super tiny language model over bytes, and GPT, the base transformer it is measured against.

    python model.py        # print the size of every config, table by table

The idea ("Super Tiny Language Models", arXiv 2405.14159): a small byte encoder and a pooler turn each patch of a few
bytes into one vector, a causal transformer runs over patches only, and a small byte decoder writes the next patch byte
by byte. Input and output share one byte table, so nearly every parameter sits in the transformer.

Text arrives as symbols: byte + 256 * (this byte ends its patch). prepare.py decides where patches end; nothing here
knows the rule. 0xFF + 256 = 511 separates documents.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

N_SYMBOLS = 512  # a byte, and whether it ends its patch
SEPARATOR = 511  # between documents: 0xFF with the flag set; no text byte 0xFF ever carries the flag


@dataclass
class STLMConfig:
    block_size: int = 512   # bytes in a row
    max_patches: int = 128  # patches in a row; past that no further patch opens
    n_layer: int = 4        # the transformer over patches
    n_head: int = 3
    n_embd: int = 192
    d_byte: int = 128       # width of the byte layers
    n_encoder: int = 1      # byte layers before pooling
    n_decoder: int = 2      # byte layers after
    n_taps: int = 5         # bytes that one convolution sees
    n_ngram: int = 1024     # rows of the hashed n-gram table; 0 = none
    dropout: float = 0.0


@dataclass
class GPTConfig:
    vocab_size: int = 50258  # GPT-2's 50,257 tokens and the separator
    block_size: int = 128    # tokens in a row
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.0


# ----------------------------------------------------------------------------------------------------------------------
# layers


def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # no learned scale: the next matrix can learn it


class MLP(nn.Module):
    def __init__(self, n, dropout):
        super().__init__()
        self.up = nn.Linear(n, 4 * n, bias=False)
        self.down = nn.Linear(4 * n, n, bias=False)
        self.dropout = dropout

    def forward(self, x):
        x = self.down(F.relu(self.up(x)).square())  # ReLU^2, "Primer" (arXiv 2109.08668)
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, n_head, T, hd)
        q, k = rotate(norm(q), rope), rotate(norm(k), rope)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = self.out(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """One layer of the transformer, the same for STLM and GPT."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config.n_embd, config.dropout)

    def forward(self, x, rope, cache=None):
        x = x + self.attn(norm(x), rope, cache)
        return x + self.mlp(norm(x))


class ByteBlock(nn.Module):
    """One byte layer: a gated causal depthwise convolution (as in LFM2) mixes a few bytes, then an MLP."""

    def __init__(self, n, n_taps, dropout):
        super().__init__()
        self.gates = nn.Linear(n, 3 * n, bias=False)
        self.taps = nn.Parameter(torch.zeros(n_taps, n))
        self.out = nn.Linear(n, n, bias=False)
        self.mlp = MLP(n, dropout)

    def forward(self, z, cache=None):
        N, K = z.size(1), len(self.taps)
        a, b, c = self.gates(norm(z)).chunk(3, dim=-1)  # (B, N, d_byte) each
        u = a * b
        u = F.pad(u, (0, 0, K - 1, 0))
        u = sum(self.taps[k] * u[:, k : k + N] for k in range(K))
        z = z + self.out(c * u)
        return z + self.mlp(norm(z))


def rope_table(n_positions, head_dim):
    """Cosines and sines of rotary positions (arXiv 2104.09864): (2, n_positions, head_dim / 2)."""
    freq = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(n_positions).float()[:, None] * freq
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rope):
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# ----------------------------------------------------------------------------------------------------------------------


class STLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(N_SYMBOLS, c.d_byte)
        if c.n_ngram:
            self.ngram = nn.Embedding(c.n_ngram, c.d_byte)
        self.encoder = nn.ModuleList(ByteBlock(c.d_byte, c.n_taps, c.dropout) for _ in range(c.n_encoder))
        self.up = nn.Linear(c.d_byte, c.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.start = nn.Parameter(torch.zeros(1, 1, c.d_byte))  # what bytes receive before the first patch closes
        self.down = nn.Linear(c.n_embd, c.d_byte, bias=False)
        self.decoder = nn.ModuleList(ByteBlock(c.d_byte, c.n_taps, c.dropout) for _ in range(c.n_decoder))
        self.register_buffer("rope", rope_table(c.max_patches, c.n_embd // c.n_head), persistent=False)
        init_weights(self)

    def embed(self, x):
        z = self.wte(x)
        if self.config.n_ngram:
            h = x
            for n in range(1, 4):
                h = h * 1000003 + F.pad(x, (n, 0))[:, : x.size(1)] + 1
                z = z + self.ngram((h ^ (h >> 17)) % self.config.n_ngram)
        return z

    def forward(self, x, y=None, reduction="mean"):
        B, N = x.shape
        P = self.config.max_patches
        z = self.embed(x)
        z = norm(z)
        for block in self.encoder:
            z = block(z)
        closed = (x >= 256).cumsum(1)  # (B, N) patches closed at or before each byte
        want = torch.arange(1, P + 1, device=x.device).expand(B, P).contiguous()
        ends = torch.searchsorted(closed, want)  # (B, P) 
        ends = (ends + 1).clamp(max=N)
        starts = F.pad(ends, (1, 0))[:, :-1]
        total = F.pad(z.float().cumsum(1), (0, 0, 1, 0))  # (B, N+1, d)
        take = lambda i: total.gather(1, i[..., None].expand(-1, -1, z.size(-1)))
        mean = (take(ends) - take(starts)) / (ends - starts).clamp(min=1)[..., None]
        h = norm(self.up(mean.to(z.dtype)))
        for block in self.blocks:
            h = block(h, self.rope)
        h = self.down(norm(h))  # (B,P,d_byte)
        h = torch.cat([self.start.to(h.dtype).expand(B, 1, -1), h], dim=1)
        z = z + h.gather(1, closed.clamp(max=P)[..., None].expand(-1, -1, z.size(-1)))
        for block in self.decoder:
            z = block(z)
        logits = F.linear(norm(z), self.wte.weight)
        if y is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(-1, N_SYMBOLS), y.reshape(-1), reduction=reduction)
        return logits, loss


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.register_buffer("rope", rope_table(c.block_size, c.n_embd // c.n_head), persistent=False)
        init_weights(self)

    def forward(self, x, y=None, reduction="mean"):
        h = norm(self.wte(x))
        for block in self.blocks:
            h = block(h, self.rope)
        logits = F.linear(norm(h), self.wte.weight)
        if y is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), y.reshape(-1), reduction=reduction)
        return logits, loss


def init_weights(model):
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "mlp.down.weight")):
            nn.init.zeros_(p)
        elif name.endswith("taps"):
            nn.init.normal_(p, std=p.size(0) ** -0.5)
        elif "wte" in name or "ngram" in name:
            nn.init.normal_(p, std=0.05)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.size(1) ** -0.5)
