"""
STLM, a language model over bytes whose transformer runs once per patch, and GPT, the baseline.

Text arrives as symbols: byte + 256 * (1 if this byte ends its patch). prepare.py decides where
patches end; the model learns any rule. Symbol 511 = 0xFF + 256 separates documents. The forward
pass of STLM, for B sequences of N symbols in at most P patches:

    symbols                                                            (B, N)
    ByteEmbedding   symbol + place in its patch + n-grams + matches    (B, N, d_byte)
    encoder         an MLP on each byte                                (B, N, d_byte)
    pool            the mean over each patch                           (B, P, d_byte)
    transformer     causal, over patches                               (B, P, n_embd)
    unpool          each byte receives its last complete patch         (B, N, d_byte)
    decoder         an MLP on each byte                                (B, N, d_byte)
    logits          by the tied byte table and the tied n-gram table   (B, N, 512)

The idea: "Super Tiny Language Models" (arXiv 2405.14159). The style: github.com/karpathy/nanoGPT.
"""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

SEPARATOR = 511
MAX_NGRAM = 16              # symbols; also the longest patch of prepare.py's words
HASH = 6364136223846793005  # hash([*symbols, s]) = HASH * (hash(symbols) + s + 1), wrapping around


@dataclass
class STLMConfig:
    block_size: int = 512       # bytes in a sequence (for gpt: tokens)
    vocab_size: int = 512       # symbols (for gpt: tokens)
    max_patches: int = 128      # at most, in training; 0 = train.py sets it from the data
    n_layer: int = 4            # layers of the transformer over patches
    n_head: int = 3             # heads of its attention
    n_embd: int = 192           # its width
    attend_twice: bool = False  # its layers attend again after their MLP, with the same weights
    window: int = 0             # chunk size: attention sees its own chunk and the last; 0 = all
    d_byte: int = 128           # width of a byte
    n_encoder: int = 1          # MLPs on each byte before pooling
    n_decoder: int = 1          # and after unpooling
    n_ngram: int = 40_960       # rows of the hashed n-gram table
    d_ngram: int = 16           # their width


# --- layers ---------------------------------------------------------------------------------------
def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # without a learned scale


class MLP(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.up = nn.Linear(n, hidden, bias=False)
        self.down = nn.Linear(hidden, n, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())  # ReLU^2, from Primer (arXiv 2109.08668)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv 2104.09864) and QK-norm."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.window = config.n_head, config.window
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, rope, cache=None, again=False):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(norm(q), rope), rotate(norm(k), rope)  # (B, n_head, T, hd)
        y = cache.attend(self, again, q, k, v) if cache else attend(q, k, v, self.window)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def attend(q, k, v, window):
    """Causal attention over q, k, v (B, n_head, T, hd). With a window, T is cut into chunks of that
    size: a position sees its own, up to itself, and the one before, so the cost grows with T
    instead of its square (local attention, as in arXiv 2004.05150)."""
    T = q.size(2)
    if window == 0 or T <= 2 * window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (F.pad(x, (0, 0, 0, -T % window)).unflatten(2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], dim=3) for x in (k, v))
    # now q is (B, n_head, chunks, window, hd), k and v are (B, n_head, chunks, 2 * window, hd)
    chunk = torch.arange(q.size(2), device=q.device)[:, None, None]
    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(-window, window, device=q.device)  # counted from the beginning of the chunk
    seen = (j <= i) & (j + chunk * window >= 0)  # (chunks, window, 2 * window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).flatten(2, 3)[:, :, :T]


def rope_table(config):
    """Cosines and sines of the rotary angles, (2, block_size, hd / 2)."""
    hd = config.n_embd // config.n_head
    frequency = 10000.0 ** -(torch.arange(0, hd, 2).float() / hd)
    angle = torch.arange(config.block_size).float()[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rope):
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """One layer of the transformer, the same for STLM and GPT."""

    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config.n_embd, 4 * config.n_embd)
        self.attend_twice = config.attend_twice

    def forward(self, x, rope, cache=None):
        x = x + self.attn(norm(x), rope, cache)
        x = x + self.mlp(norm(x))
        if self.attend_twice:  # deeper without more parameters, the paper's weight sharing
            x = x + self.attn(norm(x), rope, cache, again=True)
        return x


class ByteLayers(nn.Module):
    """MLPs on each byte: the encoder, and the decoder."""

    def __init__(self, d, n_layers):
        super().__init__()
        self.mlps = nn.ModuleList(MLP(d, 2 * d) for _ in range(n_layers))

    def forward(self, z):
        for mlp in self.mlps:
            z = z + mlp(norm(z))
        return norm(z)


# --- the embedding of a byte ----------------------------------------------------------------------
class ByteEmbedding(nn.Module):
    """All that can be looked up about a byte and what stands before it, added:

    - the symbol itself, and its place in its patch,
    - its n-grams: the last 2, 3, 4 and 5 symbols and the patch so far, each hashed to a row of
      one narrow table (BLT, arXiv 2412.09871),
    - its matches: what came next in the sequence the last time that the same 4 symbols, the same
      patch so far, or this with the patch before, occurred (lpaq, mattmahoney.net/dc).
    """

    def __init__(self, config):
        super().__init__()
        self.byte = nn.Embedding(config.vocab_size, config.d_byte)
        self.place = nn.Embedding(MAX_NGRAM, config.d_byte)
        self.ngram = nn.Embedding(config.n_ngram, config.d_ngram)
        self.ngram_up = nn.Linear(5 * config.d_ngram, config.d_byte, bias=False)
        self.match = nn.Embedding(3 * 512, config.d_byte)
        self.register_buffer("powers", torch.full((MAX_NGRAM,), HASH).cumprod(0), persistent=False)

    def forward(self, x, cache=None):
        """Symbols (B, N) to embeddings (B, N, d_byte) and the hash of the open patch, (B, N)."""
        past = cache.append(x) if cache else F.pad(x, (MAX_NGRAM - 1, 0), value=SEPARATOR)
        last = past.unfold(1, MAX_NGRAM, 1).flip(-1)                 # (B, N, 16) newest first
        hashes = ((last + 1) * self.powers).cumsum(-1)               # hashes of the last 1 to 16
        n_ends = (last[..., 1:] >= 256).cumsum(-1)                   # (B, N, 15) patch ends since
        place = (n_ends < 1).sum(-1, keepdim=True)                   # (B, N, 1) in its patch, 0-15
        patch = hashes.gather(-1, place)                             # hash of the patch so far
        two = hashes.gather(-1, (n_ends < 2).sum(-1, keepdim=True))  # and with the one before it
        ngrams = torch.cat([hashes[..., 1:5], patch + 1], dim=-1)    # + 1: in rows of their own
        keys = torch.cat([hashes[..., 3:4], patch, two], dim=-1)     # (B, N, 3)
        matches = cache.last_follower(keys, x) if cache else last_follower(keys, x)
        z = (self.byte(x) + self.place(place[..., 0])
             + self.ngram_up(self.ngram_rows(ngrams).flatten(-2))
             + self.match(matches + 512 * torch.arange(3, device=x.device)).sum(-2))
        return z, torch.where(x < 256, patch[..., 0], 0)  # 0 = no patch is open

    def ngram_rows(self, hashes):
        """The rows of the n-gram table for hashes (...): (..., d_ngram)."""
        rows = (hashes ^ (hashes >> 32)) % self.ngram.num_embeddings
        # as self.ngram(rows), but on a CPU its gradient is many times faster
        return self.ngram.weight.index_select(0, rows.flatten()).view(*rows.shape, -1)


def last_follower(keys, x):
    """The symbol that came after the last earlier position with the same key, or a separator: keys
    (B, N, M), M at each position, and symbols x (B, N) to symbols (B, N, M)."""
    keys, order = keys.sort(dim=1, stable=True)  # equal keys side by side, in their order in x
    same = F.pad(keys[:, 1:] == keys[:, :-1], (0, 0, 1, 0))
    after = F.pad(order[:, :-1] + 1, (0, 0, 1, 0)).clamp(max=x.size(1) - 1)
    symbol = torch.where(same, x[..., None].expand_as(keys).gather(1, after), SEPARATOR)
    return torch.zeros_like(symbol).scatter(1, order, symbol)


def init_weights(model):
    """What is added to a sum starts at zero, so each layer begins as the identity."""
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "ngram.weight", "place.weight")):
            nn.init.zeros_(p)
        elif name.endswith(("byte.weight", "match.weight", "wte.weight")):
            nn.init.normal_(p, std=0.05)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.size(1) ** -0.5)  # keeps the scale of what comes in


# --- the models -----------------------------------------------------------------------------------
class LanguageModel(nn.Module):
    """The methods that STLM and GPT share; generation and saving are the last part of this file."""
    text = None  # how text was cut for training: {"patcher": ..., "vocab": None or its tokens}

    def generate(self, ids, max_new, **options):
        """The max_new ids that follow ids (B, N), (B, max_new). The options are pick()'s."""
        return torch.stack(list(stream_ids(self, ids, max_new, **options)), dim=1)

    def set_block_size(self, block_size):
        """Makes room for longer sequences than trained on: no weight depends on the length."""
        max_patches = math.ceil(self.config.max_patches * block_size / self.config.block_size)
        self.config = replace(self.config, block_size=block_size, max_patches=max_patches)
        self.rope = rope_table(self.config).to(self.rope)


class STLM(LanguageModel):
    """The byte-pooled transformer. What it predicts after byte i depends on bytes 0 to i only."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = ByteEmbedding(c)
        self.encoder = ByteLayers(c.d_byte, c.n_encoder)
        self.to_patches = nn.Linear(c.d_byte, c.n_embd, bias=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.to_bytes = nn.Linear(c.n_embd, c.d_byte, bias=False)
        self.start = nn.Parameter(torch.zeros(c.d_byte))  # received before any patch is complete
        self.decoder = ByteLayers(c.d_byte, c.n_decoder)
        self.ngram_query = nn.Linear(c.d_byte, c.d_ngram, bias=False)
        self.register_buffer("rope", rope_table(c), persistent=False)
        init_weights(self)

    def forward(self, x, y=None, reduction="mean", cache=None):
        """Logits (B, N, 512) for symbols x (B, N), or the loss with the next symbols y (B, N) or
        their probabilities (B, N, 512), in nats; reduction and y = -100 are F.cross_entropy's. With
        y the bytes after max_patches patches go on with the last: all batches have one shape."""
        B, N = x.shape
        z, open_hash = self.embed(x, cache)                  # (B, N, d_byte), (B, N)
        z = self.encoder(z)
        # pool: the mean of z over each patch; what lies after P patches goes to slot P, unused
        ends = (x >= 256).long()
        n_closed = ends.cumsum(1)                            # (B, N) patches complete at each byte
        P = max(1, int(n_closed.max())) if y is None else min(self.config.max_patches, N)
        patch = (n_closed - ends).clamp(max=P)               # (B, N) the patch of each byte
        index = patch[..., None].expand_as(z)
        total = z.new_zeros(B, P + 1, z.size(2)).float().scatter_add(1, index, z.float())
        count = total.new_zeros(B, P + 1).scatter_add(1, patch, torch.ones_like(z[..., 0]).float())
        mean = (total / count.clamp(min=1)[..., None])[:, :P]

        h = self.transform(mean.to(z.dtype), self.rope[:, :P], cache)          # (B, P, d_byte)
        # unpool: each byte receives the last complete patch, never the one that is still open
        h = torch.cat([self.start.to(h.dtype).expand(B, 1, -1), h], dim=1)     # (B, 1 + P, d_byte)
        received = h.gather(1, n_closed.clamp(max=P)[..., None].expand_as(z))  # (B, N, d_byte)
        if cache:  # what step() goes on from
            cache.n_positions, cache.received = n_closed[:, -1], received[:, -1]
            still_open = (n_closed - ends == n_closed[:, -1:])[..., None]
            cache.total, cache.count = (z * still_open).sum(1), still_open.sum(1)
        logits = self.decode((z + received).flatten(0, 1), open_hash.flatten())
        if y is None:
            return logits.view(B, N, -1)
        return F.cross_entropy(logits.float(), y.flatten(0, 1), reduction=reduction)

    def transform(self, patches, rope, cache=None):
        """Patches (B, P, d_byte) to what the bytes after each receive, (B, P, d_byte)."""
        h = norm(self.to_patches(patches))  # (B, P, n_embd)
        for block in self.blocks:
            h = block(h, rope, cache)
        return self.to_bytes(norm(h))

    def decode(self, z, open_hash):
        """Logits (M, 512) for M bytes, z (M, d_byte), and the hash of the patch open at each. The
        n-gram table is tied, too: a symbol's logit counts the row of the patch that it would make,
        its own input. For speed only the best of symbols c, c + 16, c + 32, ... for each c < 16."""
        z = self.decoder(z)
        logits = F.linear(z, self.embed.byte.weight)
        best = 16 * logits.unflatten(1, (32, 16)).argmax(1) + torch.arange(16, device=z.device)
        rows = self.embed.ngram_rows(HASH * (open_hash[:, None] + best + 1) + 1)  # (M, 16, d_ngram)
        scores = (rows * self.ngram_query(z)[:, None]).sum(-1)                    # (M, 16)
        return logits.scatter_add(1, best, scores.to(logits.dtype))

    def step(self, x, cache):
        """Takes the next symbol of each sequence, x (B,), to the logits after it, (B, 512)."""
        z, open_hash = self.embed(x[:, None], cache)
        z = self.encoder(z)[:, 0]
        cache.total, cache.count = cache.total + z, cache.count + 1
        cache.running = closing = (x >= 256).nonzero()[:, 0]
        if len(closing):  # the transformer runs where a patch is complete, for one position
            mean = cache.total[closing] / cache.count[closing]
            rope = self.rope[:, cache.n_positions[closing], None, None]  # (2, closing, 1, 1, hd/2)
            cache.received[closing] = self.transform(mean[:, None], rope, cache)[:, 0]
            cache.total[closing], cache.count[closing] = 0, 0
            cache.n_positions[closing] += 1
        return self.decode(z + cache.received, open_hash[:, 0])


class GPT(LanguageModel):
    """The baseline: a transformer of the same Blocks over tokens, its table tied to the output."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.register_buffer("rope", rope_table(c), persistent=False)
        init_weights(self)

    def forward(self, x, y=None, reduction="mean", cache=None):
        """Logits (B, T, vocab_size) for tokens x (B, T), or with y (B, T) the loss, as in STLM."""
        begin = cache.n if cache else 0
        if cache:
            cache.append(x)
        h = norm(self.wte(x))  # (B, T, n_embd)
        for block in self.blocks:
            h = block(h, self.rope[:, begin : begin + x.size(1)], cache)
        logits = F.linear(norm(h), self.wte.weight)
        if y is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(0, 1), reduction=reduction)

    def step(self, x, cache):
        """Takes the next token of each sequence, x (B,), to the logits after it, (B, V)."""
        cache.running = torch.arange(len(x), device=x.device)
        cache.n_positions[:] = cache.n
        return self(x[:, None], cache=cache)[:, 0]


# --- generation -----------------------------------------------------------------------------------
class Cache:
    """What generation remembers of B sequences: their symbols, past keys and values; for STLM also
    total and count of the open patch (B, d_byte), (B, 1), and what its bytes receive."""

    def __init__(self, B, block_size, device):
        self.n = 0  # symbols so far, as many in each sequence
        self.symbols = torch.full((B, MAX_NGRAM - 1 + block_size), SEPARATOR, device=device)
        self.match_keys = torch.zeros(B, block_size, 3, dtype=torch.long, device=device)
        self.n_positions = torch.zeros(B, dtype=torch.long, device=device)  # of the transformer
        self.running = None  # the sequences that the transformer runs on; None = on their prompts
        self.keys_values = {}  # of each layer, (2, B, n_head, block_size, hd)

    def append(self, x):
        """Stores symbols x (B, T); returns them with the 15 before, (B, 15 + T)."""
        begin, self.n = self.n, self.n + x.size(1)
        self.symbols[:, MAX_NGRAM - 1 + begin : MAX_NGRAM - 1 + self.n] = x
        return self.symbols[:, begin : MAX_NGRAM - 1 + self.n]

    def last_follower(self, keys, x):
        """last_follower() for the prompt, and then for one new symbol at a time, x (B, 1)."""
        self.match_keys[:, self.n - x.size(1) : self.n] = keys
        if self.n == x.size(1):
            return last_follower(keys, x)
        position = torch.arange(1, self.n, device=x.device)[:, None]
        after = ((self.match_keys[:, : self.n - 1] == keys) * position).amax(1)  # 0 = no match
        symbol = self.symbols.gather(1, MAX_NGRAM - 1 + after)
        return torch.where(after > 0, symbol, SEPARATOR)[:, None]

    def attend(self, layer, again, q, k, v):
        """attend() for a prompt, then for one new position: q, k, v (running, n_head, 1, hd)."""
        if self.running is None:
            room = self.match_keys.size(1) - k.size(2)
            self.keys_values[layer, again] = F.pad(torch.stack([k, v]), (0, 0, 0, room))
            return attend(q, k, v, layer.window)
        past, at = self.keys_values[layer, again], self.n_positions[self.running]
        past[:, self.running, :, at] = torch.stack([k, v], dim=1)[..., 0, :]  # (running, 2, ...)
        k, v = past[..., : int(at.max()) + 1, :][:, self.running]
        j = torch.arange(k.size(2), device=q.device)
        seen = j <= at[:, None]  # (running, positions)
        if layer.window:
            seen &= j >= (at[:, None] // layer.window - 1) * layer.window
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])


def pick(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One id for each sequence from logits (B, V). temperature=0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.where(logits >= kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p is not None:  # nucleus sampling, arXiv 1904.09751
        ranked = p.sort(descending=True).values
        inside = ranked.cumsum(-1) - ranked < top_p  # the likeliest always is
        p = p * (p >= ranked.where(inside, 1).amin(-1, keepdim=True))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.inference_mode()
def stream_ids(model, ids, max_new, **options):
    """Yields the next id of each sequence, (B,), max_new times; ids (B, N) are the prompts, N > 0.
    A sequence that outgrows block_size goes on from its last half. The options are pick()'s."""
    block_size, cache = model.config.block_size, None
    for _ in range(max_new):
        if cache is None or cache.n == block_size:
            ids = ids[:, -(block_size if cache is None else max(1, block_size // 2)) :]
            cache = Cache(len(ids), block_size, ids.device)
            logits = model(ids, cache=cache)[:, -1]
        else:
            logits = model.step(ids[:, -1], cache)
        new = pick(logits, **options)
        ids = torch.cat([ids[:, -block_size:], new[:, None]], dim=1)
        yield new


# --- weights that travel --------------------------------------------------------------------------
def save_pretrained(model, folder):
    """Writes folder/model.safetensors and folder/config.json. Needs the package safetensors."""
    from safetensors.torch import save
    from prepare import whole_file
    Path(folder).mkdir(parents=True, exist_ok=True)
    with whole_file(Path(folder, "model.safetensors")) as file:
        file.write(save(model.state_dict()))
    about = {"model": type(model).__name__, "sizes": asdict(model.config), "text": model.text}
    with whole_file(Path(folder, "config.json")) as file:
        file.write(json.dumps(about).encode())


def from_pretrained(name):
    """The model in a folder of save_pretrained(), or in a repository of Hugging Face's hub."""
    from safetensors.torch import load_file
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download
        name = snapshot_download(name, allow_patterns=["model.safetensors", "config.json"])
    about = json.loads(Path(name, "config.json").read_text())
    weights = load_file(Path(name, "model.safetensors"))
    model = build(about["model"], STLMConfig(**about["sizes"]), weights)
    model.text = about["text"]
    return model.eval()


def build(kind, config, weights, edit=None):
    """The model of a kind ("STLM" or "GPT") and config, changed by edit(model), with these weights;
    raises unless they fit. A stranger's file gets no memory for sizes that it only claims."""
    kind = {"STLM": STLM, "GPT": GPT}[kind]
    possible = all(type(n) in (int, bool) and 0 <= n <= 2**20 for n in asdict(config).values())
    if not possible or config.n_layer + config.n_encoder + config.n_decoder > len(weights):
        raise ValueError("its config claims sizes that its weights do not have")
    for device in "meta", "cpu":  # first shapes alone, without memory
        with torch.device(device), torch.random.fork_rng(devices=[]):
            model = kind(config)
            if edit:
                edit(model)
        model.load_state_dict(dict(weights), assign=True)  # a copy, as torch notes assign in it
    return model
