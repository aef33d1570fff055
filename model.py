"""
STLM, a super tiny language model over bytes, and GPT, the base transformer it is measured against.

    python model.py        # print the size of every config, table by table

The idea ("Super Tiny Language Models", arXiv 2405.14159): a small byte encoder and a pooler turn each patch of a few
bytes into one vector, a causal transformer runs over patches only, and a small byte decoder writes the next patch byte
by byte. Input and output share one byte table of 512 rows: what a table of tokens would take is free for the transformer,
and for narrow rows of hashed n-grams.

Text arrives as symbols: byte + 256 * (this byte ends its patch). prepare.py decides where patches end; nothing here
knows the rule. 0xFF + 256 = 511 separates documents.
"""
import copy
import json
import os
import runpy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

N_SYMBOLS = 512  # a byte, and whether it ends its patch
SEPARATOR = 511
WINDOW = 16      # symbols that an n-gram can reach back, as long as the longest patch of prepare.py's words
LIKELIEST = 8    # symbols whose logits the table of n-grams has a say in
PLACES = 4       # matrices for what the symbols after a patch receive of it: the 1st, 2nd, 3rd and all later ones
HASH = 6364136223846793005  # odd; the hash of symbols and one more is HASH * (hash + symbol + 1), wrapping around in int64


@dataclass
class STLMConfig:
    block_size: int = 512    # bytes in a row (for model=gpt, tokens)
    max_patches: int = 128   # patches in a row: past that no further one opens; 0 = measured on the data
    n_layer: int = 4         # layers of the transformer over patches
    n_head: int = 3          # heads of its attention
    n_embd: int = 192        # its width
    attend_twice: bool = False  # its layers attend once more after their MLP, with the same weights
    window: int = 0          # patches that attention sees: its own chunk of so many and the one before; 0 = the whole row
    d_byte: int = 128        # width of a byte
    n_encoder: int = 1       # MLPs for each byte before pooling
    n_decoder: int = 1       # and after the transformer
    n_ngram: int = 40_960    # rows of the hashed n-gram table
    d_ngram: int = 16        # their width
    dropout: float = 0.0     # in the residual branches


# ----------------------------------------------------------------------------------------------------------------------
# layers


def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # without a learned scale: the matrix that follows can learn one


class MLP(nn.Module):
    def __init__(self, n, hidden, dropout):
        super().__init__()
        self.up = nn.Linear(n, hidden, bias=False)
        self.down = nn.Linear(hidden, n, bias=False)
        self.dropout = dropout

    def forward(self, x):
        x = self.down(F.relu(self.up(x)).square())  # ReLU^2, from Primer (arXiv 2109.08668)
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864) and normalised queries and keys."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.window, self.dropout = config.n_head, config.window, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None, again=False):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, n_head, T, hd)
        q, k = rotate(norm(q), rope), rotate(norm(k), rope)
        if cache is not None:
            y = cache.attend((self, again), q, k, v, self.window)
        else:
            y = attend(q, k, v, self.window)
        y = self.out(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


def attend(q, k, v, window):
    """Causal attention, all of shape (B, n_head, T, hd).

    With a window, rows of more than two are cut into chunks of one: a position sees its own chunk, up to itself, and the one
    before, so the time grows with T, not with its square (local attention, as in arXiv 2004.05150).
    """
    T = q.size(2)
    if 0 < 2 * window < T:
        q, k, v = (F.pad(x, (0, 0, 0, -T % window)).unflatten(2, (-1, window)) for x in (q, k, v))
        k, v = (torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=3) for x in (k, v))  # (..., chunks, 2 * window, hd)
        at = torch.arange(q.size(2) * window, device=q.device).view(-1, window, 1)
        seen = first_seen(at[:, :1], window) + torch.arange(2 * window, device=q.device)  # (chunks, 1, 2 * window)
    elif q.is_cpu and T <= 512:  # for rows this short the fused kernel takes up to twice as long
        seen = torch.arange(T)
        at = seen[:, None]
    else:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    hidden = (seen > at) | (seen < 0)
    score = (k @ q.mT).mT * q.size(-1) ** -0.5  # as q @ k.mT, whose gradient of k comes in columns: slow on a CPU
    y = score.float().masked_fill(hidden, -torch.inf).softmax(-1).type_as(v) @ v
    return y.flatten(2, -2)[:, :, :T]


def first_seen(at, window):
    """The first position that the one at `at` sees, the beginning of the chunk before; negative in the first chunk."""
    return (at // window - 1) * window


class Block(nn.Module):
    """One layer of the transformer, the same for STLM and GPT."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config.n_embd, 4 * config.n_embd, config.dropout)
        self.attend_twice = config.attend_twice

    def forward(self, x, rope, cache=None):
        x = x + self.attn(norm(x), rope, cache)
        x = x + self.mlp(norm(x))
        if self.attend_twice:  # depth without parameters, the paper's weight sharing
            x = x + self.attn(norm(x), rope, cache, again=True)
        return x


class Encoder(nn.Module):
    """From the embedding of each byte to what is pooled: MLPs. What stands just before, its n-grams tell: a convolution here,
    or in the decoder, costs more time than it is worth."""

    def __init__(self, config):
        super().__init__()
        self.mlps = nn.ModuleList(MLP(config.d_byte, 2 * config.d_byte, config.dropout) for _ in range(config.n_encoder))

    def forward(self, z):
        z = norm(z)  # (B, N, d_byte)
        for mlp in self.mlps:
            z = z + mlp(norm(z))
        return z


class Decoder(nn.Module):
    """From what each byte has received to logits: MLPs, then the tied tables."""

    def __init__(self, config):
        super().__init__()
        self.mlps = nn.ModuleList(MLP(config.d_byte, 2 * config.d_byte, config.dropout) for _ in range(config.n_decoder))
        self.query = nn.Linear(config.d_byte, config.d_ngram, bias=False)  # what rows of the n-gram table are compared with

    def forward(self, z, open_patch, wte, context):
        for mlp in self.mlps:
            z = z + mlp(norm(z))
        z = norm(z)
        logits = F.linear(z, wte.weight)
        # the table of n-grams is tied too: a symbol's logit also counts the row of the patch that it would make, the
        # one that it receives as input when it comes. All 512 would be slow: the likeliest ones
        best = likeliest(logits.detach())  # (B, N, 8)
        rows = context.rows(HASH * (open_patch[..., None] + best + 1) + 1)  # (B, N, 8, d_ngram)
        scores = (rows * self.query(z)[..., None, :]).sum(-1)
        # added as a whole: in bf16 scatter_add() goes by way of fp32, and a GPU needs atomics for it
        return logits + torch.zeros_like(logits).scatter(-1, best, scores.type_as(logits))


def likeliest(logits):
    """The LIKELIEST symbols of logits (..., 512)."""
    if not torch.compiler.is_compiling():
        return logits.topk(LIKELIEST).indices
    # compiled, topk() takes 7% of a step on a CPU, 5 to 15% on a GPU. With the symbol in place of its last bits no two logits
    # are the same, and the next largest is the largest below the last: in fp32 down to 8 below the first, in steps of 1 / 4096
    below = logits.float() - logits.amax(-1, keepdim=True)
    keys = (4096 * below).clamp(min=-32767).floor() * N_SYMBOLS + torch.arange(N_SYMBOLS, device=logits.device)
    best = [keys.amax(-1, keepdim=True)]
    while len(best) < LIKELIEST:
        best.append(torch.where(keys < best[-1], keys, -torch.inf).amax(-1, keepdim=True))
    return torch.cat(best, dim=-1).long() % N_SYMBOLS


class ByteContext(nn.Module):
    """The embedding of a byte: everything about it and about what came before that can be looked up, added.

    Its row of the byte table, and one for its place in its patch. The last 2, 3, 4 and 5 symbols and the patch so far,
    hashed to rows of one table (BLT, arXiv 2412.09871), a narrow one, so that many rows fit. And for the last 4 symbols, the
    patch so far and it with the patch before the row is searched for the place where they occurred last: the symbol that
    followed them there is a good guess for the next one, without learning and at any distance (the match model of data
    compressors, such as lpaq).
    """

    def __init__(self, config):
        super().__init__()
        self.grams, M = (2, 3, 4, 5), 3  # M matches
        self.ngram = nn.Embedding(config.n_ngram, config.d_ngram)
        self.ngram_up = nn.Linear((len(self.grams) + 1) * config.d_ngram, config.d_byte, bias=False)
        self.place = nn.Embedding(WINDOW, config.d_byte)
        self.match_up = nn.Linear(M * config.d_byte, config.d_byte, bias=False)
        self.register_buffer("powers", torch.full((WINDOW,), HASH).cumprod(0), persistent=False)
        self.register_buffer("offsets", N_SYMBOLS * torch.arange(M + 2), persistent=False)

    def forward(self, x, wte, cache=None):
        """Symbols (B, N) to embeddings (B, N, d_byte), and of the patch that is open after each its hash and how many symbols
        it has, from 0 to 16, both (B, N), 0 where none is open."""
        past = F.pad(x, (WINDOW - 1, 0), value=SEPARATOR) if cache is None else cache.with_past(x)
        last = past.unfold(1, WINDOW, 1).flip(-1)  # (B, N, 16) the last symbols at each byte, newest first
        codes = ((last + 1) * self.powers).cumsum(-1)  # hashes of the last 1, 2, ... 16
        closed = (last[..., 1:] >= 256).cumsum(-1)  # (B, N, 15) patches that end between there and here
        place = (closed < 1).sum(-1, keepdim=True)  # in its patch, from 0 to 15
        patch = codes.gather(-1, place)[..., 0]  # (B, N) of the patch so far
        two = codes.gather(-1, (closed < 2).sum(-1, keepdim=True))[..., 0]  # and of the one before with it, up to 16 symbols
        matched = torch.stack([codes[..., 3], patch, two], dim=-1)  # (B, N, 3) the first is of the last 4
        followed = last_follower(matched, x) if cache is None else cache.last_follower(matched, x)  # (B, N, 3)
        which = torch.cat([x[..., None], followed, place], dim=-1) + self.offsets  # (B, N, 5) rows of the table
        table = self.table(wte) if cache is None or cache.table is None else cache.table
        if cache is not None:
            cache.table = table
        # a patch has another row than the n-gram of the same symbols: + 1
        grams = self.rows(torch.stack([*(codes[..., n - 1] for n in self.grams), patch + 1], dim=-1))  # (B, N, 5, d_ngram)
        z = embedding_sum(which, table) + self.ngram_up(grams.flatten(2))
        return z, torch.where(x < 256, patch, 0), torch.where(x < 256, place[..., 0] + 1, 0)

    def table(self, wte):
        """The byte table, what each of its symbols means as a follower, and the places: (512 * 4 + 16, d_byte). Followers
        go through their matrix here, 512 symbols, not every byte."""
        d = wte.embedding_dim
        follower = torch.einsum("vd,emd->mve", wte.weight, self.match_up.weight.view(d, -1, d)).flatten(0, 1)
        return torch.cat([wte.weight, follower.type_as(wte.weight), self.place.weight])

    def rows(self, codes):
        which = (codes ^ (codes >> 32)) % self.ngram.num_embeddings
        # as self.ngram(which), whose backward pass takes three times as long on a CPU
        return self.ngram.weight.index_select(0, which.flatten()).view(*which.shape, -1)


def embedding_sum(which, table):
    """The sum of the rows which (B, N, M) of a table (rows, C): (B, N, C)."""
    if which.is_cuda:  # compiled, forth and back in less than half the time of embedding_bag; on a CPU the other way round
        return F.embedding(which, table).sum(-2)
    return F.embedding_bag(which.flatten(0, 1), table, mode="sum").view(*which.shape[:2], -1)


def last_follower(codes, x):
    """The symbol after the last earlier place in the row with the same code, a separator where there is none: (B, N, M)
    for M codes a place (B, N, M) and symbols (B, N)."""
    x = x[..., None].expand_as(codes)
    codes, order = codes.sort(dim=1, stable=True)  # equal codes one after the other, in the order of their places
    found = F.pad(codes[:, 1:] == codes[:, :-1], (0, 0, 1, 0))
    before = F.pad(order[:, :-1], (0, 0, 1, 0))
    symbol = torch.where(found, x.gather(1, (before + 1).clamp(max=x.size(1) - 1)), SEPARATOR)
    return torch.zeros_like(symbol).scatter(1, order, symbol)


def rows_at(x, i):
    """x (B, N, C) at positions i (B, M): (B, M, C)."""
    return x.gather(1, i[..., None].expand(-1, -1, x.size(2)))


def rope_table(n_positions, head_dim):
    """Cosines and sines of the rotary angles: (2, n_positions, head_dim / 2)."""
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(n_positions).float()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rope):
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Loss(nn.Module):
    """Cross-entropy in fp32; a module as the blocks are, so that train.py compiles it: one pass over the logits."""

    def forward(self, logits, y, reduction):
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction=reduction)


def init_weights(model):
    """Residual branches start at zero: every layer begins as the identity. Other matrices keep the scale of x."""
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", ".down.weight", "ngram.weight", "place.weight")):
            nn.init.zeros_(p)
        elif name.endswith("wte.weight"):
            nn.init.normal_(p, std=0.05)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.size(1) ** -0.5)


# ----------------------------------------------------------------------------------------------------------------------
# generation, the same for both models


def recorded(f):
    """f, a function of tensors on a GPU, from its fourth call on as a CUDA graph: the GPU is told once which kernels make it up,
    and repeats them on what the tensors hold by then, without waiting for Python, which takes longer to start a kernel of a
    small model than the GPU to run it."""
    graph, calls, reads, result = torch.cuda.CUDAGraph(), 0, None, None

    def call(*inputs):
        nonlocal calls, reads, result
        calls += 1
        if calls <= 3:  # compiles, and makes what an optimizer remembers
            return f(*inputs)
        if calls == 4:
            reads = [x.clone() for x in inputs]
            with torch.cuda.device(reads[0].device), torch.cuda.graph(graph):
                result = f(*reads)
        for old, new in zip(reads, inputs):
            old.copy_(new)
        graph.replay()
        return result

    return call


class Cache:
    """What generation remembers of a batch of rows: their symbols, past keys and values."""

    def __init__(self, lengths, block_size, capacity):
        self.new = lengths  # (B,) how many of the positions now coming in are real: the prompts' lengths, then ones
        self.n_symbols = lengths.clone()  # (B,) seen so far
        self.block_size = block_size
        self.capacity = capacity  # positions of the transformer that the keys and values have room for
        self.filled = torch.zeros_like(lengths)  # (B,) of them in use
        self.rows = None  # the rows that the transformer runs on; None = a whole prompt of every row
        self.mask = None  # what each of them sees, (rows, positions); None = all
        self.past = self.codes = self.table = None
        self.keys_values = {}
        self.graphs = {}  # of the kinds of steps, on a GPU

    def last_follower(self, codes, x):
        """last_follower() of a prompt, and then, with codes (B, 1, M) and x (B, 1), of one symbol after the other."""
        if self.codes is None:
            room = self.block_size - x.size(1)
            self.codes, self.symbols = F.pad(codes.mT, (0, room)), F.pad(x, (0, room))  # (B, M, block_size), (B, block_size)
            # int32 is half as much to go through for every new symbol
            self.places = torch.arange(1, self.block_size + 1, dtype=torch.int32, device=x.device)
            return last_follower(codes, x)
        row, at = torch.arange(len(x), device=x.device), self.n_symbols - 1  # (B,)
        codes = codes[:, 0]  # (B, M)
        self.codes[row, :, at] = codes  # before the search, which leaves them out: else compiled code copies all of them
        self.symbols[row, at] = x[:, 0]
        same = (self.codes == codes[..., None]) & (self.places <= at.int()[:, None, None])  # (B, M, block_size)
        after = (same * self.places).amax(-1).long()  # (B, M) one past the last such place; 0 = none
        return torch.where(after > 0, self.symbols.gather(1, after), SEPARATOR)[:, None]

    def last(self, x):
        """x (B, N, ...) at the last real position of each row: (B, 1, ...)."""
        return x if x.size(1) == 1 else x[torch.arange(len(x), device=x.device), self.new - 1, None]

    def with_past(self, x):
        """Symbols x (B, N) behind the WINDOW - 1 before them."""
        if self.past is None:  # a prompt: those up to its last real one
            x = F.pad(x, (WINDOW - 1, 0), value=SEPARATOR)
            self.past = x.gather(1, self.new[:, None] + torch.arange(WINDOW - 1, device=x.device))
        else:
            x = torch.cat([self.past, x], dim=1)
            self.past.copy_(x[:, 1:])
        return x

    def turn_to(self, rows, window, compiled):
        """Before the transformer runs on the next position of these rows: what they see, the same for all of its layers, so
        that none of them has to wait for a GPU."""
        self.rows, at = rows, self.filled[rows].clamp(max=self.capacity - 1)  # a full row closes none: any place will do
        begin, end = 0, self.capacity
        if not rows.is_cuda:  # no more than they see; a GPU would have to be asked for it
            begin, end = max(0, first_seen(int(at.min()), window)) if window else 0, int(at.max()) + 1
        self.position, self.at = at, at - begin
        self.visible = {owner: past[..., begin:end, :] for owner, past in self.keys_values.items()}
        if compiled and not rows.is_cuda:  # at once for any number of positions, not for this one first
            for past in self.visible.values():
                torch._dynamo.maybe_mark_dynamic(past, 3)
        if len(self.filled) > 1 or rows.is_cuda:  # else nothing is left out
            seen = torch.arange(begin, end, device=rows.device)
            self.mask = seen <= at[:, None]
            if window:
                self.mask &= seen >= first_seen(at[:, None], window)

    def attend(self, owner, q, k, v, window):
        kv = torch.stack([k, v])  # (2, B, n_head, T, hd)
        if self.rows is None:
            self.keys_values[owner] = F.pad(kv, (0, 0, 0, self.capacity - k.size(2)))
            return attend(q, k, v, window)
        past = self.visible[owner]
        past[:, self.rows, :, self.at] = kv[..., 0, :].transpose(0, 1)
        k, v = past if self.mask is None else past[:, self.rows]  # (rows, n_head, positions, hd)
        # plain sums for one query a row: compiled, they read past keys and values where they lie, nothing is copied
        score = (q.float() * k).sum(-1) * q.size(-1) ** -0.5  # (rows, n_head, positions)
        if self.mask is not None:
            score = score.masked_fill(~self.mask[:, None], -torch.inf)
        return (score.softmax(-1)[..., None] * v).sum(2, keepdim=True).type_as(v)

    def replay(self, kind, take, x):
        """take(x), a step; on a GPU all steps of a kind are the first one's take(), recorded."""
        if not x.is_cuda:
            return take(x)
        if kind not in self.graphs:
            self.graphs[kind] = recorded(take)
        return self.graphs[kind](x)


def pick(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Samples one id a row from logits (B, V). temperature 0 takes the likeliest; top_p is from arXiv 1904.09751."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        sorted_p, order = p.sort(descending=True)
        outside = sorted_p.cumsum(-1) - sorted_p >= top_p  # never the likeliest
        p = p.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    # torch.multinomial makes a GPU wait, and a random number for each of V ids takes longer than all of the above
    cdf = p.cumsum(-1)
    u = 1 - torch.rand(len(p), 1, generator=generator, device=p.device)  # above 0: an id of probability 0 is never found
    return torch.searchsorted(cdf, u * cdf[:, -1:])[:, 0]


class LanguageModel(nn.Module):
    """Generation for a model that has step(), advance(), room() and fit(); and weights that travel."""

    compiled = False  # whether advance() is
    text = None  # how its training text was cut, a dict: set by sample.load() and from_pretrained()

    @torch.inference_mode()
    def stream(self, prompts, max_new, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Yields max_new times the next id of every row, (B,). prompts: a list of 1-D tensors of ids, not empty.

        A row that outgrows the model goes on from the last half of its text: the caches are built anew from there.
        """
        windows, fresh, cache, room = list(prompts), [], None, 0
        for _ in range(max_new):
            if cache is not None and room == 0:  # not at every id: that costs 8%
                room = self.room(cache, ids)
            if room == 0:
                if fresh:
                    windows = [torch.cat(pair) for pair in zip(windows, torch.stack(fresh, dim=1))]
                windows, fresh = [self.fit(row) for row in windows], []
                lengths = torch.tensor([len(row) for row in windows], device=windows[0].device)
                cache = Cache(lengths, self.config.block_size, self.rope.size(1))
                logits = self(nn.utils.rnn.pad_sequence(windows, batch_first=True), cache=cache)[0][:, 0]  # (B, V)
                cache.new = torch.ones_like(lengths)
            else:
                room -= 1
                cache.n_symbols += 1
                logits = self.step(ids, cache)
            ids = pick(logits, temperature, top_k, top_p, generator)
            fresh.append(ids)
            yield ids

    def generate(self, prompts, max_new_bytes, temperature=1.0, top_k=None, top_p=None, generator=None):
        """The new ids of every row, (B, max_new_bytes): symbols, so one a byte (for GPT, tokens)."""
        return torch.stack(list(self.stream(prompts, max_new_bytes, temperature, top_k, top_p, generator)), dim=1)

    def set_block_size(self, block_size):
        """Makes room for rows of block_size bytes (for GPT, tokens), longer than those trained on or shorter. No weight depends
        on it. With a window attention sees no further than before, but matches reach back through the whole row, however long."""
        c = self.config
        longer = lambda n: -(-n * block_size // c.block_size)
        self.rope = rope_table(longer(self.rope.size(1)), c.n_embd // c.n_head).to(self.rope)
        self.config = replace(c, block_size=block_size, max_patches=longer(c.max_patches))

    def compile_steps(self):
        """Compiles what stream() and generate() do for each new id: half a minute at the first ids the first time, a few
        seconds from then on; an id of a single row then takes about a third of the time, on a GPU half."""
        options = None
        if self.rope.is_cpu:  # kernels called from C++; what a matrix makes of one row as plain sums, not by a library
            options = {"cpp_wrapper": True, "post_grad_fusion_options": {"decompose_mm_pass": {}}}
        model = copy.copy(self)  # with the same weights: a prompt is read once, not worth compiling
        model.advance, model.compiled = torch.compile(self.advance, options=options), True
        self.step = model.step

    def save_pretrained(self, folder):
        """Writes folder/model.safetensors and folder/config.json, in the model's own dtype.

        The output has no table of its own, so there is one tensor for both. Needs the package safetensors.
        """
        from prepare import need, whole_file

        weights = need("safetensors.torch", "save_pretrained()", "safetensors").save(self.state_dict())
        about = {"model": type(self).__name__, "sizes": asdict(self.config), "text": self.text}
        os.makedirs(folder, exist_ok=True)
        for name, content in ("model.safetensors", weights), ("config.json", json.dumps(about, indent=1).encode()):
            with whole_file(os.path.join(folder, name)) as file:
                file.write(content)

    @classmethod
    def from_pretrained(cls, name):
        """The model that save_pretrained() wrote into a folder, or that lies in a repository of the Hugging Face hub.

        Nothing in the files is executed. Raises BadInput for a missing package and for files that are no such model.
        """
        from prepare import BadInput, first_line, need

        load = need("safetensors.torch", "from_pretrained()", "safetensors").load_file
        folder = Path(name)
        try:
            if not folder.is_dir():
                hub = need("huggingface_hub", f"{name} is no folder; a model on the hub")
                folder = Path(hub.snapshot_download(str(name), allow_patterns=["model.safetensors", "config.json"]))
            about, weights = json.loads((folder / "config.json").read_text()), load(folder / "model.safetensors")
            kind, config = {"STLM": STLM, "GPT": GPT}[about["model"]], STLMConfig(**about["sizes"])
            if not issubclass(kind, cls):
                raise ValueError(f"it is a {kind.__name__}")
            build = lambda: kind(config) if kind is STLM else GPT(config, len(weights["wte.weight"]))
            check_fit(config, build, weights)
            model = build().to(weights["wte.weight"].dtype)
            model.load_state_dict(weights)
        except BadInput:
            raise
        except Exception as error:  # of the hub, the file system, either file's format
            raise BadInput(f"{name} is no {cls.__name__} that save_pretrained() wrote: expected a folder with config.json and "
                           f"model.safetensors, or the name of such a repository on the hub ({first_line(error)})")
        model.text = about["text"]
        return model.eval()


def check_fit(config, build, weights):
    """Raises ValueError unless the model that build() makes has just these weights. A file may be a stranger's: no memory
    is taken for sizes that it only claims."""
    if config.n_layer + config.n_encoder + config.n_decoder > len(weights):
        raise ValueError("its config claims more layers than there are weights")
    if max(config.block_size, config.max_patches) >= 2**20:
        raise ValueError("its config claims too long rows")
    with torch.device("meta"):  # shapes without memory
        expected = build().state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError("its weights do not fit its config")


# ----------------------------------------------------------------------------------------------------------------------


class STLM(LanguageModel):
    """The byte-pooled transformer. Causal: the logits at byte i depend on symbols 0..i only."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(N_SYMBOLS, c.d_byte)  # the tied byte table: input and output
        self.context = ByteContext(c)
        self.encoder = Encoder(c)
        self.up = nn.Linear(c.d_byte, c.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.down = nn.Linear(c.n_embd, PLACES * c.d_byte, bias=False)
        self.start = nn.Parameter(torch.zeros(PLACES * c.d_byte))  # what bytes receive before the first patch has closed
        self.decoder = Decoder(c)
        self.loss = Loss()
        self.register_buffer("rope", rope_table(c.max_patches, c.n_embd // c.n_head), persistent=False)
        init_weights(self)

    def forward(self, x, y=None, reduction="mean", cache=None):
        """Symbols x, y (B, N) to logits (B, N, 512) and the loss in nats a symbol; None without y.

        reduction="none" gives the loss of every symbol, (B * N,); "sum" their sum. y = -100 is left out. With a cache,
        which takes x for prompts, only the logits after the last real symbol of each: (B, 1, 512).
        """
        B, N = x.shape
        z, open_patch, n_open = self.encode(x, cache)  # (B, N, d_byte), (B, N), (B, N)

        # pool: the mean of z over each patch. One place more for what follows when max_patches have closed
        ends = (x >= 256).long()
        closed = ends.cumsum(1)  # (B, N) patches closed at or before each byte
        P = min(self.config.max_patches, N)  # in a short text there are fewer
        if cache is not None:  # nothing compiled needs one shape for all: no more than there are
            P = min(P, max(1, int(closed.max())))
        first = torch.arange(B, device=x.device)[:, None] * (P + 1)  # where a row begins when all patches lie in one row
        own = ((closed - ends).clamp(max=P) + first).flatten()  # (B * N,) the patch that a byte belongs to
        total = torch.zeros(B * (P + 1), z.size(2), device=x.device).index_add(0, own, z.float().flatten(0, 1))
        count = torch.zeros_like(total[:, 0]).index_add(0, own, torch.ones_like(own, dtype=total.dtype))
        mean = (total / count.clamp(min=1)[:, None]).view(B, P + 1, -1)[:, :P]

        h = self.core(mean.to(z.dtype), self.rope[:, :P], cache)  # (B, P, PLACES * d_byte)

        # unpool: each byte receives h of the last patch closed at or before it, never of its own open patch; the part of h
        # for its place after that patch
        h = torch.cat([self.start.to(h.dtype).expand(B, 1, -1), h], dim=1)
        patch = closed.clamp(max=P)  # past max_patches no patch opens: the last h serves the rest
        place = n_open.clamp(max=PLACES - 1)
        received = h.view(-1, z.size(2)).index_select(0, (PLACES * (patch + first) + place).flatten()).view_as(z)
        logits = self.decode(z + received, open_patch, cache)  # (B, N, 512)

        if cache is not None:  # what step() goes on from: the open patch of every row, and the h it receives
            cache.filled = cache.last(patch)[:, 0]
            cache.h = rows_at(h, cache.filled[:, None])[:, 0]
            real = torch.arange(N, device=x.device) < cache.new[:, None]
            still_open = (closed - ends == cache.last(closed)) & real  # (B, N)
            cache.count = still_open.sum(1)
            cache.sum = (z * still_open[..., None]).sum(1)
        if y is None:
            return logits, None
        return logits, self.loss(logits, y, reduction)

    def encode(self, x, cache=None):
        z, *of_open_patch = self.context(x, self.wte, cache)
        return self.encoder(z), *of_open_patch

    def core(self, pooled, rope, cache=None):
        h = norm(self.up(pooled))  # (B, P, n_embd)
        for block in self.blocks:
            h = block(h, rope, cache)
        return self.down(norm(h))

    def decode(self, z, open_patch, cache=None):
        if cache is not None:
            z, open_patch = cache.last(z), cache.last(open_patch)
        return self.decoder(z, open_patch, self.wte, self.context)

    # generation: one byte at a time through encoder and decoder, one patch at a time through the transformer

    def step(self, x, cache):
        """The next symbol of every row, (B,), to the logits after it, (B, 512)."""
        rows = (x >= 256).nonzero()[:, 0]  # those that close a patch: only for them the transformer runs
        closing = len(rows) > 0

        def take(x):
            if closing:  # on a GPU for all rows: that takes no longer, and all steps are alike
                which = torch.arange(len(x), device=x.device) if x.is_cuda else rows
                cache.turn_to(which, self.config.window, self.compiled)
            return self.advance(x, cache, closing)

        return cache.replay(closing, take, x)

    def advance(self, x, cache, closing):
        """What of a step is compiled, once for bytes inside a patch and once for those that close it."""
        z, open_patch, n_open = self.encode(x[:, None], cache)  # (B, 1, d_byte), (B, 1), (B, 1)
        cache.sum += z[:, 0]
        cache.count += 1
        if closing:  # only now the transformer runs, for one position
            self.close(x, cache)
        received = rows_at(cache.h.view(len(x), PLACES, -1), n_open.clamp(max=PLACES - 1))
        return self.decode(z + received, open_patch, cache)[:, 0]

    def close(self, x, cache):
        """The transformer's position for the patches that have just closed, of cache.rows. What it says of others among them
        is not used, and their next patch takes the place of its keys and values."""
        rows = cache.rows
        closes = x[rows] >= 256
        mean = (cache.sum[rows] / cache.count[rows, None]).to(cache.h.dtype)
        rope = self.rope[:, cache.position, None, None]  # (2, rows, 1, 1, hd / 2)
        h = self.core(mean[:, None], rope, cache)[:, 0]
        cache.h[rows] = torch.where(closes[:, None], h, cache.h[rows])
        cache.sum[rows] *= ~closes[:, None]
        cache.count[rows] *= ~closes
        cache.filled[rows] += closes

    def room(self, cache, x):
        """How many ids fit for certain, x the first, when each closes a patch; 0 = not even x."""
        c = self.config
        filled = cache.filled + (x >= 256)  # patches after x
        return min(c.block_size - int(cache.n_symbols.max()), c.max_patches - int(filled.max()) + 1)

    def fit(self, row):
        """The part of a row of symbols that the model can go on from: all of it, or at most half of what fits."""
        c, ends = self.config, (row >= 256).nonzero()[:, 0]
        if len(row) <= c.block_size and len(ends) <= c.max_patches:
            return row
        begin = max(len(row) - c.block_size // 2, 0)
        if len(ends) > c.max_patches // 2:
            begin = max(begin, int(ends[-(c.max_patches // 2) - 1]) + 1)
        return row[min(begin, len(row) - 1) :]


class GPT(LanguageModel):
    """The rival: a base transformer of the same Blocks over tokens, with its token table tied to the output.

    block_size counts tokens here, and of the config only block_size, n_layer, n_head, n_embd, attend_twice, window
    and dropout matter.
    """

    def __init__(self, config, vocab_size=50257):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.loss = Loss()
        self.register_buffer("rope", rope_table(c.block_size, c.n_embd // c.n_head), persistent=False)
        init_weights(self)

    def forward(self, x, y=None, reduction="mean", cache=None, rope=None):
        h = norm(self.wte(x))  # (B, T, n_embd)
        rope = self.rope[:, : x.size(1)] if rope is None else rope
        for block in self.blocks:
            h = block(h, rope, cache)
        logits = F.linear(norm(h if cache is None else cache.last(h)), self.wte.weight)  # (B, T, vocab_size)
        if y is None:
            return logits, None
        return logits, self.loss(logits, y, reduction)

    def step(self, x, cache):
        def take(x):
            cache.filled = cache.n_symbols - 1
            cache.turn_to(torch.arange(len(x), device=x.device), self.config.window, self.compiled)
            return self.advance(x, cache)

        return cache.replay("", take, x)

    def advance(self, x, cache):
        return self(x[:, None], cache=cache, rope=self.rope[:, cache.filled, None, None])[0][:, 0]

    def room(self, cache, x):
        return self.config.block_size - int(cache.n_symbols.max())

    def fit(self, row):
        return row if len(row) <= self.config.block_size else row[-max(1, self.config.block_size // 2) :]


# ----------------------------------------------------------------------------------------------------------------------


def print_sizes():
    """Parameters of the shipped configs, part by part."""
    print("config         total    core   bytes  n-grams  table   GPT-2's 50,257 rows at the same width")
    for path in sorted(Path(__file__).parent.glob("config/*.py")):
        values = runpy.run_path(str(path))
        if "d_byte" not in values:  # a rival, or one that takes its sizes from a checkpoint
            continue
        with torch.device("meta"):  # shapes without memory
            model = STLM(STLMConfig(**{f.name: values[f.name] for f in fields(STLMConfig) if f.name in values}))
        n = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
        core, byte_layers = n["blocks"] + n["up"] + n["down"], n["encoder"] + n["decoder"]
        gpt2, tables = 50257 * model.config.n_embd / 1e6, n["wte"] + n["context"]
        print(f"{path.stem:12}{sum(n.values()):7.2f}M{core:7.2f}M{byte_layers:7.2f}M{n['context']:7.2f}M"
              f"{n['wte']:7.2f}M{gpt2:8.2f}M: ours, with the n-grams, take {1 - tables / gpt2:.1%} less")


if __name__ == "__main__":
    print_sizes()
