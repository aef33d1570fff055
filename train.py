"""
Trains an STLM, or the rival GPT, on what prepare.py wrote.

    python train.py config/quick.py                                # 4 minutes on two CPU cores, no download
    python train.py config/stlm_50m.py --batch_size=16             # any key can be set on the command line
    python train.py config/quick.py --resume                       # go on where a run stopped
    torchrun --nproc_per_node=8 train.py config/stlm_50m.py        # several GPUs; batch_size is for each
    python train.py --help                                         # every key, its default and what it means

Writes out_dir/ckpt.pt (the latest state), best.pt (the lowest validation loss), log.jsonl and loss.png.
"""
import ctypes
import difflib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import time
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist

from model import GPT, STLM, Block, ByteContext, Decoder, Encoder, Loss, STLMConfig, check_fit, recorded
from prepare import (KNOWN, BadInput, bytes_of_ids, encode, first_line, folder_name, need, prepare, printable, run,
                     separator_of, to_text, whole_file)

# ----------------------------------------------------------------------------------------------------------------------
# the configuration: every key, once. The comment behind a key is what --help prints.


@dataclass
class Config(STLMConfig):  # and the sizes of the model, from model.py
    model: str = "stlm"               # stlm, or gpt: the base transformer to compare with
    out_dir: str = "out/stlm"         # where checkpoints and the log go
    dataset: str = "stdlib"           # the --name given to prepare.py; a known one is prepared when it is not there yet
    patcher: str = "words"            # how the text is cut: words, gpt2 or fixed:N
    tokenizer: str = "bytes"          # or gpt2 or bpe:N, token ids for model=gpt
    init_from: str = ""               # a checkpoint whose weights to start from: finetuning
    resume: bool = False              # go on from out_dir/ckpt.pt
    seed: int = 1337                  # of the weights and of the order of the data
    batch_size: int = 8               # rows a step
    grad_accum: int = 1               # batches whose gradients are added up before a step
    max_iters: int = 5000             # steps; 0 = until max_minutes
    max_minutes: float = 0.0          # minutes of training, compilation and evaluation not counted; 0 = until max_iters
    learning_rate: float = 0.01       # of Muon, for matrices
    adam_learning_rate: float = 0.004 # of AdamW, for tables and vectors
    weight_decay: float = 0.0         # on matrices
    warmup: float = 0.02              # share of the run in which the learning rates rise
    cooldown: float = 0.6             # share of the run, at its end, in which they fall to zero
    eval_interval: int = 250          # steps between evaluations, each after a checkpoint
    eval_bytes: int = 200_000         # text to score at each; the last one scores all of it
    log_interval: int = 10            # steps between lines of the log
    log: str = ""                     # tensorboard or wandb: where log.jsonl's lines also go
    sample_bytes: int = 400           # length of the sample at the end; 0 = none
    device: str = ""                  # cuda, mps or cpu; by itself the first of them that is there
    compile: bool = True              # torch.compile, where it works


HARMLESS = {"resume", "max_iters", "max_minutes", "eval_interval", "eval_bytes", "log_interval", "log",
            "sample_bytes", "device", "compile"}  # what may change when a run is resumed


def parse(argv):
    """Config keys from the command line: config files and --key=value, the later wins. Returns {key: value}."""
    types = {f.name: f.type for f in fields(Config)}
    given = {}

    def put(key, value, where):
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            raise BadInput(f"{where}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        kind = types[key]
        if where == "command line" and kind is not str:
            try:
                value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value.replace("_", ""))
            except (KeyError, ValueError):
                raise BadInput(f"{where}: {key}={value} is not of type {kind.__name__}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise BadInput(f"{where}: {key}={value!r} is not of type {kind.__name__}")
        given[key] = value

    for arg in argv:
        if arg in ("-h", "--help"):
            print(__doc__, end="\nKeys:\n")
            source = inspect.getsource(STLMConfig) + inspect.getsource(Config)
            for key, default, text in re.findall(r"^    (\w+): \w+ = (\S+) *# (.*)", source, re.M):
                print(f"  --{key}={default}".ljust(32), text)
            sys.exit(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals and types.get(key) is not bool:
                raise BadInput(f"{arg}: expected --key=value")
            put(key, value if equals else "true", "command line")
        else:
            if not os.path.isfile(arg):
                raise BadInput(f"no config file {arg}; keys are set as --key=value")
            try:
                values = runpy.run_path(arg)
            except Exception as error:
                raise BadInput(f"{arg}: {type(error).__name__}: {error}")
            for key, value in values.items():
                if not key.startswith("_") and not isinstance(value, ModuleType):
                    put(key, value, arg)
    return given


# ----------------------------------------------------------------------------------------------------------------------
# data


class Data:
    """One data file as rows of block_size + 1 ids: symbols, or tokens for the rival."""

    def __init__(self, folder, split, meta, block_size):
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size != 2 * meta[split]["symbols"]:
            raise BadInput(f"{path} is not the file that prepare.py wrote: expected {2 * meta[split]['symbols']} bytes; "
                           "run prepare.py again")
        self.path, self.N, self.n_text = path, block_size, meta[split]["bytes"]
        self.ids = np.memmap(path, np.uint16, "r")
        self.vocab, self.separator = meta["vocab"], separator_of(meta["vocab"])
        self.n_bytes = bytes_of_ids(self.vocab)
        if split == "train" and len(self.ids) < 2 * block_size:
            raise BadInput(f"block_size={block_size} is too long for {path} with {len(self.ids)} symbols: at most half")

    def check(self, rows):
        if rows.max() > self.separator:
            raise BadInput(f"{self.path} is corrupt: it holds {rows.max()}, expected ids up to {self.separator}; "
                           "run prepare.py again")
        return torch.from_numpy(rows.astype(np.int64))

    def count(self, y):
        """Bytes of text, patches (for the rival tokens) and symbols that the targets y hold."""
        n_patches = int((y >= 256).sum()) if self.vocab is None else y.numel()
        return np.array([int(self.n_bytes[y.numpy()].sum()), n_patches, y.numel()])

    def training_rows(self, start, n, seed):
        """Rows start to start + n of an endless shuffled sequence: x, y of shape (n, N).

        Each epoch visits every window once, in a seeded random order, and shifts the windows by a random offset.
        """
        per_epoch = len(self.ids) // self.N - 1
        rows = []
        for row in range(start, start + n):
            order, offset = epoch_order(per_epoch, self.N, seed, row // per_epoch)
            i = offset + order[row % per_epoch] * self.N
            rows.append(self.ids[i : i + self.N + 1])
        rows = self.check(np.stack(rows))
        return rows[:, :-1], rows[:, 1:]

    def scoring_batches(self, batch_size, n_text=None, rank=0, world=1):
        """Windows in order, so that every id is scored once: x, y of shape (batch_size, N); -100 in y is padding.

        n_text: score about that many bytes of text, in windows spread evenly over the file; None = all of it.
        """
        n_windows = -(-len(self.ids) // self.N)
        share = 1 if n_text is None else min(1, n_text / self.n_text)
        windows = np.linspace(0, n_windows - 1, max(1, int(n_windows * share))).astype(int)[rank::world]
        for i in range(0, len(windows), batch_size):
            x = torch.full((batch_size, self.N), self.separator)
            y = torch.full((batch_size, self.N), -100)
            for row, w in enumerate(windows[i : i + batch_size]):
                ids = self.check(self.ids[w * self.N : (w + 1) * self.N])
                y[row, : len(ids)] = ids
                x[row, 1 : len(ids)] = ids[:-1]
                if w > 0:  # the first byte of all is predicted from a separator
                    x[row, 0] = int(self.ids[w * self.N - 1])
            yield x, y


@lru_cache(maxsize=2)
def epoch_order(n_windows, block_size, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n_windows), rng.integers(block_size)


def load_meta(folder):
    """meta.json of a prepared dataset, and its vocabulary (None for symbols) under "vocab"."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        vocab = folder / "vocab.json"
        meta["vocab"] = json.loads(vocab.read_text()) if vocab.exists() else None
        check_cut(meta)
        for split in "train", "val":
            if type(meta[split]["symbols"]) is not int or min(meta[split]["bytes"], meta[split]["bytes_per_patch"]) <= 0:
                raise ValueError(f"no text in {split}")
        return meta
    except (ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
        raise BadInput(f"{folder} is damaged: meta.json or vocab.json is not what prepare.py wrote "
                       f"({first_line(error)}); run prepare.py again")


def check_cut(meta):
    """How text was cut, as a data folder or a checkpoint says: a known patcher and, for tokens, a vocabulary of bytes."""
    if meta["patcher"] != "gpt2":  # known, and its vocabulary may need a download
        encode(b"", meta["patcher"])
    if meta["vocab"] is not None:
        "".join(meta["vocab"]).encode("latin-1")


def find_data(cfg):
    """The folder of the dataset, prepared first when it is a known one."""
    folder = Path("data") / folder_name(cfg.dataset, cfg.patcher, cfg.tokenizer)
    if (folder / "meta.json").is_file():
        return folder
    if cfg.dataset not in KNOWN:
        raise BadInput(f"no dataset in {folder}: prepare your text with python prepare.py FILES --name={cfg.dataset} "
                       f"--patcher={cfg.patcher} --tokenizer={cfg.tokenizer}, or use --dataset=stdlib")
    return prepare([cfg.dataset], patcher=cfg.patcher, tokenizer=cfg.tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# optimization


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the name of a precision
# (a, b, c) of each iteration: a x + b x^3 + c x^5 brings singular values nearest to one, step by step, from 0.01 to 1 on
# (the way of Polar Express, arXiv 2505.16932). Three do as well as Muon's own five, in less time
ITERATIONS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: every direction of a matrix moves equally far (kellerjordan.github.io/posts/muon).

    The steps of torch.optim.Muon but for the iterations; matrices of one shape and of its transpose are taken together, and
    in dtype: torch's is always bf16, which many processors only emulate, at a hundredth of the speed of fp32.
    """

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95, dtype=torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads, means = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            grads = torch._foreach_lerp(grads, means, group["momentum"])  # Nesterov's
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            same_shape = {}
            for p, grad in zip(params, grads):
                same_shape.setdefault(tuple(sorted(p.shape)), []).append((p, wide(grad)))
            for pairs in same_shape.values():
                params, grads = zip(*pairs)
                updates = orthogonal(torch.stack(grads).to(self.dtype))  # (matrices, short side, long side)
                updates.mul_(group["lr"])
                for p, update in zip(params, updates):
                    wide(p).sub_(update, alpha=max(1, p.size(0) / p.size(1)) ** 0.5)


def wide(x):
    """x (rows, columns) or its transpose, with no more rows than columns."""
    return x if x.size(0) <= x.size(1) else x.mT


def orthogonal(x):
    """About the nearest matrices to x (n, rows, columns) with orthonormal rows, by Newton-Schulz iteration; rows <= columns."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in ITERATIONS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def tables_of(model):
    return [p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()]


def make_optimizers(model, cfg, precision="bf16"):
    """Muon for the matrices inside the network, AdamW for tables and vectors: every parameter in exactly one."""
    tables = tables_of(model)
    matrices = [p for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()]
    held = {id(p) for p in tables + matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    assert len(tables) + len(matrices) + len(rest) == len(list(model.parameters()))
    muon = Muon(matrices, cfg.learning_rate, cfg.weight_decay, dtype=DTYPES[precision])
    groups = [{"params": tables, "betas": (0.9, 0.999)}, {"params": rest}]  # a row is met rarely: a longer memory
    adamw = torch.optim.AdamW(groups, lr=cfg.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True,
                              capturable=True)  # in a CUDA graph
    for group in muon.param_groups + adamw.param_groups:
        group["base_lr"] = group["lr"]
    return [muon, adamw]


def lr_scale(progress, cfg):
    """Warmup, constant, linear cooldown to zero (WSD), over progress from 0 to 1."""
    up = progress / cfg.warmup if cfg.warmup else 1.0
    down = (1 - progress) / cfg.cooldown if cfg.cooldown else 1.0
    return max(0.0, min(1.0, up, down))


def take_step(model, optimizers, batches, autocast, scale):
    """One step on a list of batches (x, y) with the learning rates scaled, by a number or a tensor; returns the mean loss, a
    tensor."""
    total = 0.0
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1 or not dist.is_initialized()
        with nullcontext() if last else model.no_sync():  # ranks exchange gradients once a step
            with autocast:
                _, loss = model(x, y)
            (loss / len(batches)).backward()
        total += loss.detach() / len(batches)
    if total.device.type == "cpu" and not total.isfinite():
        return total  # before the optimizers spread it over every weight; on a GPU looking would make it wait
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def make_step(model, optimizers, autocast, record):
    """take_step() as a function of a list of batches and the scale. With record, on a GPU, as a CUDA graph."""
    if not record:
        return lambda batches, scale: take_step(model, optimizers, batches, autocast, scale)
    take = recorded(lambda scale, *ids: take_step(model, optimizers, list(zip(ids[::2], ids[1::2])), autocast, scale))
    return lambda batches, scale: take(torch.full((), scale, device=batches[0][0].device), *chain(*batches))


@torch.no_grad()
def evaluate(model, data, batch_size, device, autocast, n_text=None, rank=0, world=1):
    """Bits per byte: all nats / (ln 2 * bytes of text), separators predicted but not counted as text."""
    model.eval()
    nats = n_bytes = 0.0
    for x, y in data.scoring_batches(batch_size, n_text, rank, world):
        with autocast:
            _, loss = model(x.to(device), y.to(device), reduction="sum")
        nats += loss.item()
        n_bytes += int(data.n_bytes[y[y >= 0].numpy()].sum())
    model.train()
    nats, n_bytes = all_ranks([nats, n_bytes], device)
    return nats / math.log(2) / n_bytes


def check_finite(model, loss, it, out):
    """Ends a run that holds a NaN or an infinity, before it can get into a checkpoint."""
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken or not math.isfinite(loss):
        raise BadInput(f"{broken[0] if broken else 'the loss'} is no longer finite at iteration {it}: try lower learning "
                       f"rates (or --resume, if it was the machine's fault); the checkpoints in {out} are from before")


def all_ranks(values, device, op="sum"):
    """A list of numbers, combined over all ranks."""
    if not dist.is_initialized():
        return values
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return t.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# the machine


def to_device(x, device):
    """Without waiting for a GPU to end what it is doing."""
    return x.contiguous().pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else x.to(device)


def synchronize(device):
    if device != "cpu":
        getattr(torch, device.split(":")[0]).synchronize()


def matmul_peak(device, precision, smaller=1):
    """FLOP/s of a product of large square matrices, or of so many times smaller ones, measured."""
    n = (1024 if device == "cpu" else 8192 if device.startswith("cuda") else 2048) // smaller
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    times = []
    while len(times) < 8 and sum(times) < 0.2:
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def model_flops(model, n_symbols, n_patches):
    """Operations of training on so much text that are the model's own: 6 for each parameter of a matrix it passes, and
    attention. The core sees patches, the rest symbols; for the rival both are tokens."""
    count = lambda *parts: sum(p.numel() for name, p in model.named_parameters() if name.startswith(parts))
    c = model.config
    row = n_patches * c.block_size / n_symbols  # places in a row, of which one sees half, or one and a half windows
    products = c.n_layer * c.n_embd * (3 * c.window if 0 < 2 * c.window < row else row)
    core = count("blocks", "up", "down") + products + c.attend_twice * (4 * c.n_layer * c.n_embd**2 + products)
    rest = count("encoder", "decoder", "wte", "context.ngram_up")
    return 6 * (core * n_patches + rest * n_symbols)


def choose_device(wanted):
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted or found)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device={wanted} does not work here ({str(error).splitlines()[0]}); expected {found}")
    return wanted or found


def keep_memory():
    """Lets the C library keep what a step frees for the next one. By itself glibc gives it back and takes it again, page by
    page: a twentieth of a step on a CPU."""
    with suppress(OSError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def why_no_compile(device):
    """None when torch.compile works on this machine, else the reason."""
    if device.startswith("mps"):
        return "not on mps"
    try:
        from torch._inductor import config

        config.cpp.vec_isa_ok = True  # the processor tells what vector units it has; trying them by compiling takes 5 s
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, no headers: each fails in its own way
        return first_line(error)


def compile_blocks(model):
    """Block by block: all blocks of a kind share one compiled function, so it is ready in seconds, not minutes. On a single GPU
    the whole model as one: 8% less time a step there."""
    if not next(model.parameters()).is_cpu and not dist.is_initialized():
        model.compile(dynamic=False)
        return
    for module in model.modules():
        if isinstance(module, (Block, Encoder, Decoder, Loss)):
            module.compile(dynamic=False)
        if isinstance(module, ByteContext) and module.ngram.weight.is_cpu:  # compiled, its backward pass is slow there
            module.rows = torch.compiler.disable(module.rows)


def choose_precision(device):
    """Which of fp32 and bf16 this device multiplies faster: its autocast, its name, and its peak in FLOP/s, what MFU is a
    share of."""
    torch.set_float32_matmul_precision("high")
    if device.startswith("cuda"):  # where another job is on it too, a measurement tells little
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        turns = [[matmul_peak(device, precision, smaller=2) for precision in DTYPES] for _ in range(3)]
        fp32, bf16 = map(max, zip(*turns))  # in turns: a neighbour on the machine may slow one down and not the other
        fast = bf16 >= 1.2 * fp32  # else it may be emulated: slow
    if all_ranks([not fast], device, "max")[0]:
        return nullcontext(), "fp32", matmul_peak(device, "fp32")
    return torch.autocast(device.split(":")[0], torch.bfloat16), "bf16", matmul_peak(device, "bf16")


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def save(path, checkpoint):
    """Under a temporary name first: at any moment the file under the final name is whole."""
    with whole_file(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # how it tells that a write failed
            raise BadInput(f"{path} could not be written (no space left?): {first_line(error)}; what lies there is from "
                           "before and whole: make room, and --resume goes on from it")


def lock(folder):
    """Makes folder and takes it for this process; released with the returned file. Raises BadInput when it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        raise BadInput(f"another run is writing to {folder}: wait for its end, or choose another --out_dir")
    return file


def load_checkpoint(path, device="cpu"):
    """A checkpoint of this project as a dict; its weights fit its config. Raises BadInput.

    A file from a stranger is safe: nothing in it is executed, and no memory is taken for sizes that it only claims.
    """
    if not os.path.isfile(path):
        raise BadInput(f"no checkpoint {path}: train first, or name another --out_dir")
    try:
        intact = zipfile.ZipFile(path).testzip() is None  # torch.load does not look at the checksums
        checkpoint = torch.load(path, map_location=device, weights_only=True) if intact else {}
        config, weights, meta = checkpoint["config"], checkpoint["model"], checkpoint["meta"]
        types = {f.name: f.type for f in fields(Config)}
        if any(type(v) is not types.get(k, type(v)) for k, v in config.items()):
            raise ValueError("a value in its config has the wrong type")
        check_sizes({"window": 0} | config)  # a key younger than many a checkpoint
        check_fit(sizes_of(config), lambda: build_model(config, meta["vocab"]), weights)
        check_cut(meta)
    except Exception as error:
        raise BadInput(f"{path} is damaged or not a checkpoint of this project ({first_line(error)})")
    return checkpoint


def patches_a_row(cfg, meta):
    """max_patches, and where that is 0 room for rows with 15% more patches than the data's average; where it is near that, as
    whole chunks of attention: what fills up the last one would cost as much as patches."""
    if cfg.model != "stlm" or cfg.max_patches:
        return cfg.max_patches
    n = 1.15 * cfg.block_size / meta["train"]["bytes_per_patch"]
    whole = cfg.window * round(n / max(cfg.window, 1))
    return whole if 0.95 * n < whole < 1.05 * n else int(n)


def sizes_of(config):
    """The part of a config (a dict of train.py's keys) that is the model's."""
    return STLMConfig(**{f.name: config[f.name] for f in fields(STLMConfig) if f.name in config})


def build_model(config, vocab):
    """The model of a config, for symbols or for a vocabulary of tokens."""
    size = sizes_of(config)
    return STLM(size) if config["model"] == "stlm" else GPT(size, 512 if vocab is None else len(vocab))


# ----------------------------------------------------------------------------------------------------------------------
# the run


def start(given):
    """Settles the configuration of a run from the keys given and from the checkpoint it goes on from, if any."""
    cfg, checkpoint = Config(**given), None
    if cfg.resume:
        path = Path(cfg.out_dir) / "ckpt.pt"
        checkpoint = load_checkpoint(path)
        stored = {k: v for k, v in checkpoint["config"].items() if k in asdict(cfg)}
        changed = [k for k, v in given.items() if v != stored.get(k, v) and k not in HARMLESS]
        if changed:
            raise BadInput(f"--resume: {', '.join(changed)} differ from the run in {path}; "
                           "leave them as they were, or start afresh in another --out_dir")
        cfg = Config(**stored | {k: v for k, v in given.items() if k in HARMLESS})
    elif cfg.init_from:
        checkpoint = load_checkpoint(cfg.init_from)
        shape = {f.name for f in fields(STLMConfig)} - {"dropout"} | {"model", "patcher", "tokenizer"}
        stored = {k: v for k, v in checkpoint["config"].items() if k in shape}
        changed = [k for k in given if given[k] != stored.get(k, given[k])]
        if changed:
            raise BadInput(f"--init_from: {', '.join(changed)} differ from {cfg.init_from}; leave them out")
        cfg = Config(**given | stored)
    if not (cfg.max_iters or cfg.max_minutes):
        raise BadInput("set max_iters or max_minutes: a run needs an end")
    if cfg.model not in ("stlm", "gpt"):
        raise BadInput(f"model={cfg.model} is unknown: expected stlm or gpt")
    if cfg.log not in ("", "tensorboard", "wandb"):
        raise BadInput(f"log={cfg.log} is unknown: expected tensorboard or wandb")
    check_sizes(asdict(cfg))
    return cfg, checkpoint


def check_sizes(config):
    """Refuses what no model can be built with or no run can do."""
    for key in ("block_size", "n_layer", "n_head", "n_embd", "d_byte", "n_ngram", "d_ngram", "batch_size",
                "grad_accum", "eval_interval", "log_interval"):
        if config[key] < 1:
            raise BadInput(f"{key}={config[key]}: expected at least 1")
    for key in "block_size", "max_patches":
        if not 0 <= config[key] < 2**20:
            raise BadInput(f"{key}={config[key]}: expected less than {2**20:,}")
    for key in "window", "n_encoder", "n_decoder":
        if config[key] < 0:
            raise BadInput(f"{key}={config[key]}: expected at least 0")
    if config["n_embd"] % (2 * config["n_head"]):
        raise BadInput(f"n_embd={config['n_embd']}: expected a multiple of 2 * n_head = {2 * config['n_head']}")


def train(given):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    say = print if rank == 0 else lambda *args, **kwargs: None
    cfg, checkpoint = start(given)
    if rank == 0:
        find_data(cfg)  # prepares a known dataset while the other ranks wait to be joined
    device = choose_device(cfg.device)
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    # the data
    folder = find_data(cfg)
    meta = load_meta(folder)
    if cfg.model == "stlm" and meta["vocab"] is not None:
        raise BadInput(f"{folder} holds tokens, which model=gpt reads; expected symbols: prepare.py --tokenizer=bytes")
    if checkpoint and any(checkpoint["meta"][k] != meta[k] for k in ("patcher", "vocab")):
        raise BadInput(f"{folder} is cut with {meta['patcher']}, the checkpoint with {checkpoint['meta']['patcher']}: "
                       "prepare the data the same way")
    if cfg.resume and checkpoint["meta"]["sha256"] != meta["sha256"]:
        raise BadInput(f"--resume: {folder} is not the text that this run was trained on")
    cfg.max_patches = patches_a_row(cfg, meta)
    data, val_data = Data(folder, "train", meta, cfg.block_size), Data(folder, "val", meta, cfg.block_size)

    # the machine
    keep_memory()
    autocast, precision, peak = choose_precision(device)
    why_not = "--compile=false" if not cfg.compile else why_no_compile(device)
    say(f"{device}, {torch.get_num_threads()} threads: {precision}, matmul peak {peak / 1e9:,.0f} GFLOP/s, "
        f"compile {'off: ' + why_not if why_not else 'on (takes up to a minute)'}")

    # the model and its optimizers
    torch.manual_seed(cfg.seed)
    raw = build_model(asdict(cfg), meta["vocab"]).to(device)
    if checkpoint:
        raw.load_state_dict(checkpoint["model"])
    optimizers = make_optimizers(raw, cfg, precision)
    it = first = 0
    clock, best, seen = 0.0, math.inf, 0
    if cfg.resume:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        it = first = checkpoint["iter"]
        clock, best, seen = checkpoint["clock"], checkpoint["best"], checkpoint["seen"]
    # on a CPU the first step of a new run is not compiled: what is wrong shows at once, in plain words
    compile_at = None if why_not else 1 if device == "cpu" and it == 0 else it
    model = torch.nn.parallel.DistributedDataParallel(raw) if world > 1 else raw
    step = make_step(model, optimizers, autocast, record=device == "cuda" and not why_not)
    say(f"{sum(p.numel() for p in raw.parameters()) / 1e6:.2f}M parameters; {folder}: "
        f"{meta['train']['bytes'] / 1e6:.1f} MB to train on, {meta['val']['bytes'] / 1e6:.1f} MB to validate on")

    # the log
    out = Path(cfg.out_dir)
    log_path = out / "log.jsonl"
    if rank == 0:
        held = lock(out)  # until this function returns
        if not cfg.resume and (out / "ckpt.pt").exists():  # never over an earlier run
            shutil.rmtree(f"{out}.old", ignore_errors=True)
            os.replace(out, f"{out}.old")
            say(f"the earlier run in {out} is now in {out}.old")
            held = lock(out)  # noqa: F841, the new folder
        kept = log_path.read_text().splitlines() if cfg.resume and log_path.exists() else []
        log_path.write_text("".join(line + "\n" for line in kept if json.loads(line)["iter"] <= first))
        log_elsewhere = other_log(cfg, out)

    def write_log(**entry):
        if rank == 0:
            with open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")
            log_elsewhere(entry)

    def save_as(name):
        if rank == 0:
            save(out / name, {
                "model": raw.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "config": asdict(cfg),
                "meta": {k: meta[k] for k in ("patcher", "tokenizer", "vocab", "sha256")},
                "iter": it, "clock": clock, "best": best, "seen": seen,
            })

    def tick():  # time spent on training since the last mark
        nonlocal clock, interval, mark
        now = time.perf_counter()
        clock, interval, mark = clock + now - mark, interval + now - mark, now

    stop = False

    def ask_to_stop(*_):
        nonlocal stop
        stop = True

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    # the loop: check, save, evaluate, step
    nats = torch.zeros((), device=device)
    counts = np.zeros(3, int)  # bytes, patches, symbols since the last line of the log
    interval, mark = 0.0, time.perf_counter()
    while True:
        progress = max(it / (cfg.max_iters or math.inf), clock / 60 / (cfg.max_minutes or math.inf))
        progress, stopping = all_ranks([progress, stop], device, "max")
        done = progress >= 1
        at_eval = it > first and (done or stopping or it % cfg.eval_interval == 0)
        if counts.any() and (at_eval or it % cfg.log_interval == 0):
            sums = all_ranks([nats.item(), *counts.tolist()], device)
            tick()
            if not math.isfinite(sums[0]):
                check_finite(raw, sums[0], it, out)
            train_bpb = sums[0] / math.log(2) / sums[1]
            seen += int(sums[1])
            speed, patches_s = sums[1] / interval, sums[2] / interval
            mfu = model_flops(raw, sums[3], sums[2]) / interval / peak / world
            left = max(0.0, clock * (1 - progress) / progress)
            say(f"iter {it:5d}  train {train_bpb:.3f} bpb  {speed / 1e3:.1f} KB/s  {patches_s / 1e3:.2f}K patches/s  "
                f"mfu {mfu:.0%}  {int(left // 60)}:{int(left % 60):02d} left", flush=True)
            write_log(iter=it, minutes=clock / 60, bytes=seen, train_bpb=train_bpb, bytes_per_s=speed,
                      patches_per_s=patches_s, mfu=mfu)
            nats.zero_()
            counts[:] = 0
            interval = 0.0
        if at_eval:
            check_finite(raw, 0.0, it, out)
            save_as("ckpt.pt")  # before the evaluation: a crash there loses nothing
            if stopping and not done:
                say(f"stopped at iteration {it}; --resume goes on from {out}/ckpt.pt")
                break
            n_text = None if done else cfg.eval_bytes
            val_bpb = evaluate(raw, val_data, cfg.batch_size, device, autocast, n_text, rank, world)
            of = f" on all {meta['val']['bytes']:,} bytes" if done else ""
            say(f"iter {it:5d}  val {val_bpb:.4f} bpb{of}", flush=True)
            write_log(iter=it, minutes=clock / 60, bytes=seen, val_bpb=val_bpb, all_of_val=done)
            if val_bpb < best:
                best = val_bpb
                save_as("best.pt")
            if not done:  # and once more: a shared machine may have been slow before
                peak = max(peak, matmul_peak(device, precision))
            mark = time.perf_counter()
        if done:
            break

        torch.manual_seed(cfg.seed + 1_000_003 * it + rank)  # dropout depends on the step alone: nothing to store
        batches = []
        for micro in range(cfg.grad_accum):
            row = ((it * cfg.grad_accum + micro) * world + rank) * cfg.batch_size
            x, y = data.training_rows(row, cfg.batch_size, cfg.seed)
            counts += data.count(y)
            batches.append((to_device(x, device), to_device(y, device)))
        if it == compile_at:
            compile_blocks(raw)
        loss = step(batches, lr_scale(progress, cfg))
        if device == "cpu" and not loss.isfinite():
            check_finite(raw, loss.item(), it, out)
        nats += loss * y.numel() * cfg.grad_accum
        it += 1
        if it - 1 in (first, compile_at):  # a first step and compilation: told, not counted
            synchronize(device)
            what = "first step" if it == first + 1 else "compiled"
            say(f"{what} after {time.perf_counter() - mark:.1f} s", flush=True)
            nats.zero_()
            counts[:] = 0
            mark = time.perf_counter()
        tick()

    if rank == 0 and done:
        plot_log(out)
        if cfg.sample_bytes > 0:
            raw.eval()
            with torch.compiler.set_stance("force_eager"):  # its shapes change from byte to byte
                ids = raw.generate([torch.tensor([data.separator], device=device)], cfg.sample_bytes, temperature=0.8)
            text = to_text(ids[0].cpu().numpy(), meta["vocab"])
            say("-" * 80, printable(text.decode("utf-8", "replace")), "-" * 80, sep="\n")
    if world > 1:
        dist.barrier()  # a rank that leaves while another still works can crash on its way out
        del model  # before the group: if it let go last, it and the group's own thread could wait for each other for ever
        dist.destroy_process_group()


def other_log(cfg, out):
    """A function that takes a line of the log to tensorboard or wandb; their files lie in out_dir too."""
    if cfg.log == "tensorboard":
        need("tensorboard", "--log=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(out)

        def write(entry):
            for key in entry.keys() - {"iter"}:
                writer.add_scalar(key, entry[key], entry["iter"])
            writer.flush()  # what is not written at a kill is lost

        return write
    if cfg.log == "wandb":
        run = need("wandb", "--log=wandb").init(project="stlm", name=out.name, dir=out, config=asdict(cfg))
        return lambda entry: run.log(entry, step=entry["iter"])
    return lambda entry: None


def pyplot(figure):
    """matplotlib's pyplot, to draw a file with; None, and one line, where the package is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no {figure}: pip install matplotlib")
        return None
    return plt


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def plot_log(out):
    """Draws out_dir/loss.png: bits per byte against minutes of training."""
    plt = pyplot("loss.png")
    if plt is None:
        return
    entries = read_log(out)
    plt.figure(figsize=(7, 4))
    for key, style in (("train_bpb", "-"), ("val_bpb", "o-")):
        points = [(e["minutes"], min(e[key], 4.0)) for e in entries if key in e]  # the first lines would hide the rest
        plt.plot([x for x, _ in points], [y for _, y in points], style, label=key.removesuffix("_bpb"))
    plt.xlabel("minutes of training")
    plt.ylabel("bits per byte")
    plt.legend()
    plt.grid(alpha=0.3)
    plt.savefig(out / "loss.png", dpi=120, bbox_inches="tight")
    plt.close()


def main():
    try:
        train(parse(sys.argv[1:]))
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search("gloo|nccl|Connection|timeout", str(error), re.I)):
            raise
        raise BadInput(f"rank {dist.get_rank()} stops: another rank has gone ({first_line(error)}); "
                       "start again with --resume, with as many ranks as are left")


if __name__ == "__main__":
    run(main)
