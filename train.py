"""
Trains an STLM, or the baseline GPT, on a dataset that prepare.py wrote.

    python train.py config/quick.py                           # 4 minutes on two CPU cores
    python train.py config/stlm_50m.py --batch_size=16        # any key can be set
    python train.py config/quick.py --resume                  # continue a stopped run
    torchrun --nproc_per_node=8 train.py config/stlm_50m.py   # several GPUs, batch_size on each
    python train.py --help                                    # every key and what it means

Writes ckpt.pt (the latest state), best.pt (the lowest validation loss), log.jsonl and loss.png.

A config file is Python. Besides keys it may define two functions: edit(model) changes a new model
before its training, loss(model, x, y) replaces the loss of a batch, symbols x and y (B, N). Names
in CAPITALS or with a leading _, its other functions, classes and modules are its own affair.
"""
import difflib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace


def idle_seconds():
    """Of all cores together, since the machine started."""
    return float(Path("/proc/uptime").read_text().split()[1])


if __name__ == "__main__" and os.path.exists("/proc/uptime"):
    before, _, after = idle_seconds(), time.sleep(0.3), idle_seconds()
    if os.cpu_count() - (after - before) / 0.3 > 0.5:  # so many cores are taken by other programs
        # threads that wait for one another spin: fast on an idle machine, ruinous beside another
        # program. OpenMP reads this when torch is imported
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from model import GPT, STLM, STLMConfig, build
from prepare import (KNOWN, BadInput, bytes_of_ids, decode, first_line, folder_name, prepare,
                     printable, run, separator_of, whole_file)

GOLDEN = (5 ** 0.5 - 1) / 2
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()  # by torchrun
RANK, WORLD_SIZE = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if LAUNCHED else (0, 1)


# --- configuration --------------------------------------------------------------------------------
@dataclass
class Config(STLMConfig):  # and the sizes of the model, in model.py
    model: str = "stlm"                # stlm, or gpt: the baseline
    out_dir: str = "out/stlm"          # where checkpoints and the log go
    dataset: str = "stdlib"            # the --name given to prepare.py, or one that it knows
    patcher: str = "words"             # how text is cut into patches: words, gpt2 or fixed:N
    tokenizer: str = "bytes"           # or, for model=gpt, gpt2 or bpe:N
    init_from: str = ""                # a checkpoint whose weights to start from: finetuning
    resume: bool = False               # continue from out_dir/ckpt.pt
    seed: int = 1337                   # of the weights and of the order of the data
    batch_size: int = 8                # sequences in a batch
    grad_accum: int = 1                # batches in a step
    max_iters: int = 5000              # steps; 0 = no limit
    max_minutes: float = 0.0           # of training, without evaluation; 0 = no limit
    learning_rate: float = 0.01        # of Muon, for matrices
    adam_learning_rate: float = 0.004  # of AdamW, for tables and vectors
    warmup: float = 0.02               # share of the run in which the learning rates rise
    cooldown: float = 0.6              # share of the run, at its end, in which they fall to zero
    eval_interval: int = 250           # steps between evaluations, each after a checkpoint
    eval_bytes: int = 200_000          # text to score at each; the last one scores all of it
    log_interval: int = 10             # steps between lines of the log
    sample_bytes: int = 400            # length of the sample at the end (gpt: tokens); 0 = none
    device: str = ""                   # cuda, mps or cpu; by default the first that is there
    compile: bool = True               # torch.compile, where it works


KEYS = {f.name: f.type for f in fields(Config) if f.name != "vocab_size"}  # the data decide that
SIZES = {f.name for f in fields(STLMConfig)}
OF_A_MODEL = SIZES | {"model", "patcher", "tokenizer"}
MAY_CHANGE = {"resume", "out_dir", "dataset", "max_iters", "max_minutes", "eval_interval",
              "eval_bytes", "log_interval", "sample_bytes", "device", "compile"}  # on resume
MAY_BE_ZERO = {"max_patches", "window", "n_encoder", "n_decoder", "seed", "max_iters",
               "sample_bytes"}


def parse(arguments):
    """Config files and --key=value, the later wins: {key: value} and {"edit" or "loss": function}.
    """
    values, given, hooks = {}, {}, {}
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(f"{__doc__}\nKeys, each as --key=value:")
            print(inspect.getsource(STLMConfig), inspect.getsource(Config), sep="\n")
            sys.exit()
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            values[key] = value if equals else "true"
        elif not argument.endswith(".py"):
            raise BadInput(f"{argument}: expected a config file (.py) or --key=value")
        else:
            try:
                name = re.sub(r"\W", "_", argument)  # not of a module that the file may import
                spec = spec_from_file_location(name, argument)
                module = module_from_spec(spec)
                sys.modules[name] = module  # where torch.compile looks for its functions
                spec.loader.exec_module(module)
            except Exception as error:
                raise BadInput(f"config file {argument}: {first_line(error)}")
            for key, value in vars(module).items():
                if key in ("edit", "loss"):
                    if not inspect.isfunction(value):
                        raise BadInput(f"config file {argument}: expected {key} to be a function")
                    hooks[key] = value
                elif not (key[0] == "_" or key.isupper() or callable(value)
                          or isinstance(value, ModuleType)):
                    values[key] = value
    for key, value in values.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1) or ["--help"]
            raise BadInput(f"unknown key {key}; did you mean {near[0]}?")
        kind, text = KEYS[key], str(value)
        try:
            given[key] = dict(true=True, false=False)[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise BadInput(f"{key}={text}: expected a value of type {kind.__name__}")
    return given, hooks


def file_of(hook):
    """The name of the file of a function, also of a decorated one, or "none"."""
    return Path(inspect.unwrap(hook).__code__.co_filename).name if hook else "none"


def settle(given, hooks):
    """The configuration of a run, and the checkpoint that it starts from or None."""
    cfg, checkpoint = Config(**given), None
    path = f"{cfg.out_dir}/ckpt.pt" if cfg.resume else cfg.init_from
    if path:
        _, checkpoint = load_checkpoint(path, hooks.get("edit") if cfg.resume else None)
        if cfg.resume and file_of(hooks.get("loss")) != checkpoint["hooks"].get("loss", "none"):
            raise BadInput(f"{path}: expected the config file of its hooks, {checkpoint['hooks']}")
        kept = KEYS.keys() - {"out_dir"} if cfg.resume else OF_A_MODEL
        stored = {key: value for key, value in checkpoint["config"].items() if key in kept}
        differ = {key for key in stored.keys() & given if given[key] != stored[key]}
        if differ := sorted(differ - MAY_CHANGE):
            raise BadInput(f"{', '.join(differ)} differ from {path}: leave them as they were there")
        cfg = Config(**stored | given)

    for key, kind in KEYS.items():
        value = getattr(cfg, key)
        low = 1 if kind is int and key not in MAY_BE_ZERO else 0
        high = 1 if key in ("warmup", "cooldown") else 2**20 if key in SIZES else 10**12
        if type(value) is not kind or kind in (int, float) and not low <= value <= high:
            raise BadInput(f"{key}={value}: expected {low} to {high:,} ({kind.__name__})")
    if cfg.n_embd % (2 * cfg.n_head):
        raise BadInput(f"n_embd={cfg.n_embd}: expected a multiple of 2 * n_head = {2 * cfg.n_head}")
    if not (cfg.max_iters or cfg.max_minutes):
        raise BadInput("max_iters=0 and max_minutes=0: expected a limit, a run needs an end")
    if cfg.model not in ("stlm", "gpt"):
        raise BadInput(f"model={cfg.model}: expected stlm or gpt")
    if cfg.model == "stlm" and cfg.tokenizer != "bytes":
        raise BadInput(f"tokenizer={cfg.tokenizer}: expected bytes; model=gpt reads tokens")
    return cfg, checkpoint


# --- data -----------------------------------------------------------------------------------------
class Data:
    """One split of a dataset: a memory-mapped array of symbols (for GPT: tokens)."""

    def __init__(self, folder, split, meta, block_size):
        path, n = folder / f"{split}.bin", meta[split]["symbols"]
        if not path.is_file() or path.stat().st_size != 2 * n:
            raise BadInput(f"{path}: expected {2 * n} bytes; run prepare.py again")
        if split == "train" and n < 2 * block_size:
            raise BadInput(f"block_size={block_size}: expected at most {n // 2}, half of the data")
        self.ids, self.block_size = np.memmap(path, np.uint16, "r"), block_size
        self.n_bytes = meta[split]["bytes"]
        self.separator = separator_of(meta["vocab"])
        self.bytes_of = torch.from_numpy(bytes_of_ids(meta["vocab"]))  # 0 for the separator

    def count_bytes(self, y):
        return int(self.bytes_of[y[y >= 0]].sum())

    def sequences(self, first, n, seed):
        """Sequences first to first + n of an endless stream: x and y (n, block_size). Each begins a
        golden ratio of the text after the last one, which covers it evenly at any time."""
        N = self.block_size
        places = np.random.default_rng(seed).random() + np.arange(first, first + n) * GOLDEN
        begins = (places % 1 * (len(self.ids) - N)).astype(int)
        rows = np.stack([self.ids[begin : begin + N + 1] for begin in begins])
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def scoring_batches(self, batch_size, n_bytes=math.inf):
        """Yields x and y (batch_size, block_size): windows of about n_bytes of text, spread evenly
        and without overlap: over all text every byte is a target exactly once. y = -100 is padding.
        """
        N = self.block_size
        n_windows = math.ceil(len(self.ids) / N)
        n_scored = max(1, int(n_windows * min(1, n_bytes / self.n_bytes)))
        windows = np.linspace(0, n_windows - 1, n_scored).astype(int)[RANK::WORLD_SIZE]
        for i in range(0, len(windows), batch_size):
            x = torch.full((batch_size, N), self.separator)  # also what the first byte follows
            y = torch.full((batch_size, N), -100)
            for row, begin in enumerate(windows[i : i + batch_size] * N):
                ids = torch.from_numpy(self.ids[begin : begin + N].astype(np.int64))
                y[row, : len(ids)] = ids
                x[row, 1 : len(ids)] = ids[:-1]
                if begin > 0:
                    x[row, 0] = int(self.ids[begin - 1])
            yield x, y


def load_meta(folder):
    """What prepare.py says about the dataset in a folder, a dict."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return {key: meta[key] for key in ("patcher", "vocab", "sha256", "train", "val")}
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{folder} is damaged ({first_line(error)}); run prepare.py again")


def find_data(cfg):
    """The dataset's folder and its load_meta(); prepares a known dataset first."""
    folder = Path("data") / folder_name(cfg.dataset, cfg.patcher, cfg.tokenizer)
    if not (folder / "meta.json").is_file():
        if cfg.dataset not in KNOWN:
            raise BadInput(f"no dataset in {folder}: run prepare.py FILES --name={cfg.dataset} "
                           f"--patcher={cfg.patcher} --tokenizer={cfg.tokenizer}")
        prepare([cfg.dataset], patcher=cfg.patcher, tokenizer=cfg.tokenizer)
    meta = load_meta(folder)
    if (meta["vocab"] is None) != (cfg.tokenizer == "bytes"):
        raise BadInput(f"{folder} does not fit tokenizer={cfg.tokenizer}: expected another dataset")
    return folder, meta


# --- optimizers -----------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal: all directions of a matrix move equally far
    (kellerjordan.github.io/posts/muon). Unlike torch.optim.Muon it works in fp32, too."""

    def __init__(self, matrices, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                mean = self.state[p]["momentum"]
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(mean, group["momentum"]).to(self.dtype))
                p.sub_(update, alpha=group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalize(x):
    """Brings the singular values of x near 1 by Newton-Schulz iterations, a x + b x^3 + c x^5,
    with coefficients for three of them in the way of Polar Express (arXiv 2505.16932)."""
    if x.size(0) > x.size(1):
        return orthogonalize(x.mT).mT  # so that x @ x.mT is the smaller product
    x = x / (1.02 * x.norm()).clamp(min=1e-7)  # safely below 1, where the polynomials diverge
    coefficients = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)
    for a, b, c in coefficients:
        square = x @ x.mT
        square = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, square, x, beta=a)
    return x


def make_optimizers(model, cfg, dtype):
    """Muon for matrices, AdamW for tables and vectors: every parameter in exactly one."""
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    matrices = [p for p in model.parameters() if p.ndim == 2 and all(p is not t for t in tables)]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": tables, "betas": (0.9, 0.999)},  # rows are met rarely: a longer memory
              {"params": vectors, "betas": (0.9, 0.95)}]
    adamw = torch.optim.AdamW(groups, cfg.adam_learning_rate, weight_decay=0, fused=True)
    return [Muon(matrices, cfg.learning_rate, dtype=dtype), adamw]


def learning_rate_scale(progress, cfg):
    """Warmup, stable, decay (WSD): a factor from 0 to 1 over progress from 0 to 1."""
    up = progress / cfg.warmup if cfg.warmup else 1
    down = (1 - progress) / cfg.cooldown if cfg.cooldown else 1
    return max(0, min(1, up, down))


# --- evaluation -----------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, data, batch_size, autocast, n_bytes=math.inf):
    """Bits per byte of text, all nats / (ln 2 * bytes): separators are predicted, but no text."""
    device = next(model.parameters()).device
    model.eval()
    nats = n_scored = 0
    for x, y in data.scoring_batches(batch_size, n_bytes):
        with autocast:
            nats += model(x.to(device), y.to(device), reduction="sum").item()
        n_scored += data.count_bytes(y)
    model.train()
    nats, n_scored = all_ranks(dist.ReduceOp.SUM, device, nats, n_scored)
    return nats / math.log(2) / n_scored


def check_finite(iteration, tensors):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise BadInput(f"training diverged at iteration {iteration}: try lower learning rates")


def all_ranks(operation, device, *numbers):
    """The numbers of all ranks, combined."""
    if WORLD_SIZE == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, operation)
    return numbers.tolist()


# --- the machine ----------------------------------------------------------------------------------
def choose_device(name):
    """The torch.device of that name; without a name, of an accelerator or the CPU."""
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and WORLD_SIZE > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no numbers
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device={name} does not work here ({first_line(error)})")


def choose_dtype(device):
    """bf16 where the hardware has it: emulated, it is far slower than fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not tell
        fast = device.type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def compile_model(model, loss_of, x, y, mode=None):
    """Compiles a model by one forward and backward pass; where that fails, one line says why."""
    if model.rope.is_cpu and isinstance(model, STLM):  # look-ups are faster as they are
        model.embed.forward = torch.compiler.disable(model.embed.forward)
        model.embed.ngram_rows = torch.compiler.disable(model.embed.ngram_rows)
    model.compile(dynamic=False, mode=mode)
    started = time.perf_counter()
    try:
        loss_of(model, x, y).backward()
        print(f"compiled after {time.perf_counter() - started:.0f} s")
    except Exception as error:  # no C++ compiler, no Triton, no headers: each in its own way
        model._compiled_call_impl = None
        print(f"compile off: {first_line(error)}")
    model.zero_grad()


@contextmanager
def stop_signals():
    """Yields a list that is empty until Ctrl-C or SIGTERM; a second one ends the run at once."""
    signals = []

    def receive(number, frame):
        signals.append(number)
        if len(signals) > 1 and WORLD_SIZE == 1:  # torchrun sends one twice
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- checkpoints and the log ----------------------------------------------------------------------
def load_checkpoint(path, edit=None):
    """The model of a checkpoint and the checkpoint, a dict. Nothing in the file is executed. An
    edited model needs edit(model) of its config file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        expected = checkpoint.setdefault("hooks", {}).get("edit", "none")
        if file_of(edit) != expected:
            raise BadInput(f"{path}: expected the config file of its edit(): {expected}")
        sizes = STLMConfig(**checkpoint["sizes"])
        model = build(checkpoint["kind"], sizes, checkpoint["model"], edit)
        model.text = {key: checkpoint["data"][key] for key in ("patcher", "vocab")}
        bytes_of_ids(model.text["vocab"])
        Config(**checkpoint["config"])  # refuses unknown keys
        return model, checkpoint
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{path} is missing, damaged or of another program ({first_line(error)})")


def new_model(cfg, meta):
    sizes = STLMConfig(**{key: getattr(cfg, key) for key in SIZES})
    sizes.vocab_size = len(meta["vocab"] or range(512))
    if not sizes.max_patches:  # a tenth more than the average, in whole chunks of attention
        average, chunk = cfg.block_size / meta["train"]["bytes_per_patch"], max(1, cfg.window)
        sizes.max_patches = chunk * math.ceil(1.1 * average / chunk)
    torch.manual_seed(cfg.seed)
    return STLM(sizes) if cfg.model == "stlm" else GPT(sizes)


def open_out_dir(cfg, state):
    """out_dir, new or with the log up to the checkpoint."""
    out = Path(cfg.out_dir)
    if RANK == 0:
        ours = {"ckpt.pt", "best.pt", "log.jsonl", "loss.png"}
        names = set(os.listdir(out) if out.is_dir() else [])
        if names & ours and not cfg.resume:  # never over an earlier run
            if names - ours:
                raise BadInput(f"out_dir={out} holds more than a run: expected another name")
            free = next(n for n in count(1) if not os.path.lexists(f"{out}.{n}"))
            print(f"the earlier run in {out} is now in {out.rename(f'{out}.{free}')}")
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / "log.jsonl") as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in state.log)
    return out


def plot(log, path):
    """Draws bits per byte against minutes of training."""
    figure = Figure()
    axes = figure.subplots()
    for key in "train_bpb", "val_bpb":
        points = [(entry["minutes"], entry[key]) for entry in log if key in entry]
        axes.plot(*np.array(points).reshape(-1, 2).T, ".-", label=key)
    axes.set(xlabel="minutes of training", ylabel="bits per byte", ylim=(None, 4))
    axes.legend()
    figure.savefig(path)


def print_sample(model, n, vocab):
    prompt = torch.tensor([[separator_of(vocab)]], device=model.rope.device)
    with torch.compiler.set_stance("force_eager"):  # one byte at a time is another shape
        ids = model.generate(prompt, n, temperature=0.8)[0]
    print(printable(decode(ids.cpu().numpy(), vocab).decode("utf-8", "replace")))


# --- training -------------------------------------------------------------------------------------
def train(given, hooks={}):
    cfg, checkpoint = settle(given, hooks)
    if "loss" in hooks and WORLD_SIZE > 1:
        raise BadInput("loss() of a config file: expected one process, not torchrun")
    device = choose_device(cfg.device)
    if WORLD_SIZE > 1:
        if RANK == 0:
            find_data(cfg)  # may prepare it while the other ranks wait to be joined
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder, meta = find_data(cfg)
    for key in ("patcher", "vocab", "sha256")[: 3 if cfg.resume else 2]:
        if checkpoint and meta[key] != checkpoint["data"][key]:
            raise BadInput(f"{folder} differs from the data of the checkpoint in its {key}")
    train_data = Data(folder, "train", meta, cfg.block_size)
    val_data = Data(folder, "val", meta, cfg.block_size)

    torch.set_float32_matmul_precision("high")
    dtype = choose_dtype(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    raw_model = new_model(cfg, meta)
    if checkpoint and not cfg.resume:
        raw_model.load_state_dict(checkpoint["model"])
    if "edit" in hooks and hooks["edit"](raw_model) is not None:
        raise BadInput("edit() of a config file: expected it to change the model and return None")
    raw_model.to(device)
    optimizers = make_optimizers(raw_model, cfg, dtype)
    # iterations and seconds of training, bytes read, the last iteration that was evaluated, the
    # lowest validation loss, lines of log.jsonl
    state = SimpleNamespace(iter=0, seconds=0.0, bytes=0, evaluated=0, best=math.inf, log=[])
    if cfg.resume:
        state = SimpleNamespace(**checkpoint["state"])
        for optimizer, stored in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(stored)
    print(f"{sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f}M parameters, {device}, "
          f"{dtype}, OMP_WAIT_POLICY={os.getenv('OMP_WAIT_POLICY', 'active')}\n"
          f"{folder}: {train_data.n_bytes:,} bytes to train on, {val_data.n_bytes:,} to validate")

    def loss_of(model, x, y):
        with autocast:
            x, y = x.to(device), y.to(device)
            return hooks["loss"](model, x, y) if "loss" in hooks else model(x, y)

    out = open_out_dir(cfg, state)
    folder_itself = RANK == 0 and out.stat()
    if cfg.compile:
        x, y = train_data.sequences(0, cfg.batch_size, cfg.seed)
        # CUDA graphs, as a GPU runs small kernels faster than Python starts them
        graphs = device.type == "cuda" and WORLD_SIZE == cfg.grad_accum == 1
        compile_model(raw_model, loss_of, x, y, "reduce-overhead" if graphs else None)
    if cfg.resume:  # only now, as a loss() may have changed buffers while it was compiled
        raw_model.load_state_dict(checkpoint["model"])
    model = torch.nn.parallel.DistributedDataParallel(raw_model) if WORLD_SIZE > 1 else raw_model

    def save(name):
        if RANK == 0:
            with whole_file(out / name) as file:
                torch.save({"kind": type(raw_model).__name__, "sizes": asdict(raw_model.config),
                            "model": raw_model.state_dict(), "config": asdict(cfg), "data": meta,
                            "hooks": {name: file_of(hook) for name, hook in hooks.items()},
                            "state": vars(state),
                            "optimizers": [optimizer.state_dict() for optimizer in optimizers]},
                           file)

    def log(text, **entry):
        with suppress(BrokenPipeError):  # whoever reads the output may be gone
            print(f"iter {state.iter:5d}  {text}")
        state.log.append({"iter": state.iter, "minutes": state.seconds / 60, "bytes": state.bytes,
                          **entry})
        if RANK == 0:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(state.log[-1]) + "\n")

    nats, logged = 0.0, (state.seconds, state.bytes)  # since, and at, the last line of the log
    with stop_signals() as signals:
        while True:
            progress = max(state.iter / (cfg.max_iters or math.inf),
                           state.seconds / 60 / (cfg.max_minutes or math.inf))
            progress, stopping = all_ranks(dist.ReduceOp.MAX, device, progress, len(signals))
            done = progress >= 1
            if done and state.evaluated == state.iter:
                print("this run is finished; a larger --max_iters or --max_minutes continues it")
                break

            if RANK == 0 and not os.path.samestat(out.stat(), folder_itself):
                raise BadInput(f"another run has begun in {out}, and this one's folder was renamed")

            # save, and evaluate
            at_eval = state.iter > state.evaluated and state.iter % cfg.eval_interval == 0
            if done or stopping or at_eval:
                check_finite(state.iter, raw_model.parameters())
                save("ckpt.pt")  # before the evaluation: a crash there loses nothing
                if stopping and not done:
                    print(f"stopped at iteration {state.iter}; continue with --resume")
                    break
                bpb = evaluate(model, val_data, cfg.batch_size, autocast, cfg.eval_bytes)
                if bpb < state.best:
                    state.best = bpb
                    save("best.pt")
                if done:
                    bpb = evaluate(model, val_data, cfg.batch_size, autocast)
                log(f"val {bpb:.4f} bpb" + done * " on all text", val_bpb=bpb, all_of_val=done)
                state.evaluated = state.iter
            if done:
                save("ckpt.pt")  # with what these evaluations said
                break

            # forward and backward
            started = time.perf_counter()
            torch.manual_seed(cfg.seed + 1_000_003 * state.iter + RANK)  # the same after --resume
            for micro_step in range(cfg.grad_accum):
                batch = (state.iter * cfg.grad_accum + micro_step) * WORLD_SIZE + RANK
                x, y = train_data.sequences(batch * cfg.batch_size, cfg.batch_size, cfg.seed)
                loss = loss_of(model, x, y)
                (loss / cfg.grad_accum).backward()
                nats += loss.detach() * y.numel()
                state.bytes += train_data.count_bytes(y) * WORLD_SIZE  # about: of other ranks, too
            at_log = (state.iter + 1) % cfg.log_interval == 0
            if at_log or device.type == "cpu":  # asking a GPU for a number makes it wait
                check_finite(state.iter, [nats])

            # step
            for optimizer, rate in zip(optimizers, (cfg.learning_rate, cfg.adam_learning_rate)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * learning_rate_scale(progress, cfg)
                optimizer.step()
                optimizer.zero_grad()
            state.iter += 1
            state.seconds += time.perf_counter() - started

            # log
            if at_log:
                n_bytes = state.bytes - logged[1]
                nats = all_ranks(dist.ReduceOp.SUM, device, float(nats))[0]
                bpb = nats / math.log(2) / n_bytes
                speed = n_bytes / (state.seconds - logged[0])
                left = state.seconds / 60 * (1 / progress - 1) if progress else 0
                log(f"train {bpb:.3f} bpb  {speed / 1e3:.1f} KB/s  {left:.1f} min left",
                    train_bpb=bpb, bytes_per_s=speed)
                nats, logged = 0.0, (state.seconds, state.bytes)

    if done and RANK == 0:
        plot(state.log, out / "loss.png")
        if cfg.sample_bytes:
            print_sample(raw_model.eval(), cfg.sample_bytes, meta["vocab"])


ADVICE = {"out of memory|allocate": "halve --batch_size and double --grad_accum",
          "gloo|nccl|[Cc]onnection": "another rank has gone: start again with --resume",
          "inline_container": "is the disk full? Make room and start again with --resume"}


def main():
    try:
        train(*parse(sys.argv[1:]))
        if WORLD_SIZE > 1:  # after the model has gone, as DDP can hang otherwise
            dist.destroy_process_group()
    except (RuntimeError, MemoryError) as error:  # by torch or numpy
        for pattern, advice in ADVICE.items():
            if re.search(pattern, str(error)):
                raise BadInput(f"rank {RANK} stops, {advice} ({first_line(error)})")
        raise


if __name__ == "__main__":
    sys.stdout = open(os.devnull, "w") if RANK > 0 or not sys.stdout else sys.stdout
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
