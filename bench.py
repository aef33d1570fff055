"""
Measures training and generation of an STLM beside the rival GPT of the same total size, in one run on one machine.

    python bench.py                                        # config/stlm_10m.py and config/gpt_10m.py
    python bench.py config/stlm_50m.py                     # and config/gpt_50m.py
    python bench.py config/stlm_10m.py --tokenizer=bpe:4096 --n_embd=320 --n_layer=7    # another rival
    python bench.py config/stlm_10m.py config/gpt_10m.py ../nanoGPT transformers        # and other projects' GPT-2
    python bench.py --lengths --dataset=novels             # speed and memory at rows of 1, 4 and 16 KB
    python bench.py --profile config/quick.py              # where the time of a training step goes, and the least it could take
    python bench.py --compress=data/stdlib                 # bits per byte of general compressors on the same text
    python bench.py --prepare=data/stdlib                  # the speed of cutting its text, beside tiktoken's own
    python bench.py --runs out/stlm.1 out/stlm.2 out/bpe.1 out/bpe.2     # finished runs side by side, and a figure
    python bench.py --sizes                                # draws where the parameters of the configs lie
    python bench.py --val out/quick out/finetune data/stdlib data/mine       # models on the validation text of datasets
    python bench.py --val --block_size=16384 out/quick data/stdlib           # in longer rows than those trained on
    python bench.py --tasks=blimp,hellaswag,arc_easy,winogrande,piqa,lambada_openai,mmlu --out_dir=out/quick --limit=100
                                                           # the field's benchmarks, through the package lm-eval

The first six read the standard library's source, so no download is needed, or --dataset=NAME; other keys change the rivals.
../nanoGPT is a folder that holds a clone of it, transformers the package; both get the sizes of the rival before them, and
train as nanoGPT does on such a device. Each model runs in a process of its own; a few steps each, they take turns, so
that a machine whose speed changes does so for all. Figures of training are medians.
Of runs, folders that differ after their last dot only are seeds of one model: the table shows their mean.
"""
import bz2
import gzip
import importlib.util
import json
import lzma
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sample as S
import train as T
from prepare import (BadInput, Parser, encode, gpt2_vocab, need, prepare, run, separator_of, to_ids, to_text, tokenizer,
                     whole_file)

STEPS, TURN, WARMUP, PROFILED = 15, 3, 5, 5


def end_turn():
    """In a worker: lets the others work until the parent writes a line."""
    print("TURN", flush=True)
    input()


def text_of(cfg):
    """The training rows that a config names, and what its meta.json says; settles max_patches."""
    folder = T.find_data(cfg)
    meta = T.load_meta(folder)
    cfg.max_patches = T.patches_a_row(cfg, meta)
    return T.Data(folder, "train", meta, cfg.block_size), meta


def our_training(cfg, meta, device, autocast, precision, compiled):
    """A model of ours and its step(x, y), as train.py takes it."""
    T.keep_memory()
    torch.manual_seed(0)
    model = T.build_model(asdict(cfg), meta["vocab"]).to(device)
    optimizers = T.make_optimizers(model, cfg, precision)
    if compiled:
        T.compile_blocks(model)
    step = T.make_step(model, optimizers, autocast, record=compiled and device == "cuda")
    return model, lambda x, y: step([(x, y)], 1.0)


def measure(given, batches, peer=None):
    """Figures of one model: a dict of row -> value. batches: how many rows are written at once. peer: another project's
    GPT-2 of the sizes in given."""
    cfg = T.Config(**given)
    device = T.choose_device(cfg.device)
    data, meta = text_of(cfg)
    autocast, precision, peak = T.choose_precision(device)
    compiled = peer is None and cfg.compile and not T.why_no_compile(device)
    if peer is None:  # learns how often patches end
        model, step = our_training(cfg, meta, device, autocast, precision, compiled)
    else:
        torch.manual_seed(0)
        model, step, generate = other_gpt2(peer, cfg, len(data.n_bytes), device)
        precision = "bf16" if device.startswith("cuda") else "fp32"  # as nanoGPT's train.py takes them

    times, loading, counts = [], [], 0
    for i in range(WARMUP + STEPS):
        if i >= WARMUP and i % TURN == 0:
            end_turn()
        T.synchronize(device)
        start = time.perf_counter()
        x, y = data.training_rows(i * cfg.batch_size, cfg.batch_size, seed=0)
        loaded = time.perf_counter()
        step(T.to_device(x, device), T.to_device(y, device))
        T.synchronize(device)
        if i < WARMUP:
            first = time.perf_counter() - start if i == 0 else first
            continue
        times.append(time.perf_counter() - start)
        loading.append((loaded - start) / times[-1])
        counts = counts + data.count(y)
    n_bytes, n_patches, n_symbols = map(int, counts)
    seconds = statistics.median(times)
    cuda = device.startswith("cuda")
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "bytes of text a step": n_bytes / STEPS,
        "training, KB/s": n_bytes / STEPS / seconds / 1e3,
        "training, ms a step": seconds * 1e3,
        "loading, % of a step": 100 * statistics.median(loading),
        "first step, s (compilation)": first,
        "peak memory, MB": memory / 1e6,
        "bits of a number in matmuls": 16 if precision == "bf16" else 32,
    }
    if peer is None:
        flops = T.model_flops(model, n_symbols, n_patches)
        peak = max(peak, T.matmul_peak(device, precision))  # and once more: a shared machine may have been slow before
        figures["MFU, % of the measured peak"] = 100 * flops / STEPS / seconds / peak

    # generation: half a row is given, the rest is written; the first logits part the two times
    writer = model
    if peer is None:  # the same weights, nothing compiled
        writer = T.build_model(asdict(cfg), meta["vocab"]).to(device)
        writer.load_state_dict(model.state_dict())
        # the same text each time, so that a second call meets nothing that is not compiled yet
        generate = lambda prompts, n: writer.generate(prompts, n, generator=torch.Generator(device).manual_seed(0))
    writer.eval()
    half = cfg.block_size // 2

    def seconds_for(prompts, n):
        """Of reading the prompts, and of writing n ids after that."""
        read_at = []

        def first_logits(*_):
            hook.remove()  # else it would be a part of each step, and nothing could be compiled across it
            T.synchronize(device)
            read_at.append(time.perf_counter())

        hook = writer.register_forward_hook(first_logits)
        T.synchronize(device)
        start = time.perf_counter()
        generate(prompts, n)
        T.synchronize(device)
        return read_at[0] - start, time.perf_counter() - read_at[0]

    def generation(how):
        for rows in batches:
            end_turn()
            prompts = [data.check(data.ids[i : i + half]).to(device) for i in range(0, rows * half, half)]
            name, n = f"{rows} row{'s' * (rows > 1)}{how}", min(half, 512)
            torch.compiler.reset()  # what has met other numbers of rows is compiled for any number: slower
            seconds_for(prompts, n if how else 2)  # a first call is slower
            if not how:
                reading = statistics.median(seconds_for(prompts, 1)[0] for _ in range(3))
                figures[f"reading half a row, {name}, ms"] = 1e3 * reading
            writing = seconds_for(prompts, n)[1]
            # a token as long as in the text: what hardly trained models write is longer
            figures[f"writing after it, {name}, KB/s"] = rows * (n - 1) * n_bytes / n_symbols / writing / 1e3

    with torch.compiler.set_stance("force_eager"):  # nanoGPT's is compiled on a GPU
        generation("")
    if compiled:  # as sample.py --compile, and with --bf16 where training takes it
        writer.to(T.DTYPES[precision]).compile_steps()
        generation(f", compiled, {precision}")
    return figures


def profile(given):
    """Prints where the time of a training step goes, operator by operator, beside two floors: its operations at the measured
    peak of matmuls, and its weights, gradients and moments once through memory at the measured bandwidth."""
    cfg = T.Config(**given)
    T.check_sizes(asdict(cfg))
    device = T.choose_device(cfg.device)
    data, meta = text_of(cfg)
    autocast, precision, peak = T.choose_precision(device)
    model, step = our_training(cfg, meta, device, autocast, precision, cfg.compile and not T.why_no_compile(device))
    x, y = (ids.to(device) for ids in data.training_rows(0, cfg.batch_size, seed=0))

    def seconds(job):
        start = time.perf_counter()
        job()
        T.synchronize(device)
        return time.perf_counter() - start

    a, b = torch.ones(2, 2**26, device=device)
    bandwidth = 2 * a.nbytes / min(seconds(lambda: a.copy_(b)) for _ in range(5))
    # now room in the heap for the profiler's notes, which else cut up what freed tensors leave: then the next tensors need new
    # pages, up to half of a step on a CPU, and it looks as if the kernels that first touch them were slow
    del a, b
    times = [seconds(lambda: step(x, y)) for _ in range(WARMUP + STEPS)]
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED):
            step(x, y)
        T.synchronize(device)
    n_bytes, n_patches, n_symbols = map(int, data.count(y.cpu()))
    flops = T.model_flops(model, n_symbols, n_patches)
    # a weight, its gradient and one moment (Muon's; two of AdamW, which has the tables) are read, all but the gradient written
    moved = 4 * sum(5 * p.numel() for p in model.parameters()) + 4 * sum(2 * p.numel() for p in T.tables_of(model))
    print(f"{n_bytes:,} bytes of text a step, {precision}: {1e3 * statistics.median(times[WARMUP:]):.1f} ms, and no less than\n"
          f"{1e3 * flops / peak:8.2f} for {flops / 1e9:.1f} GFLOP of the model at {peak / 1e9:,.0f} GFLOP/s\n"
          f"{1e3 * moved / bandwidth:8.2f} for {moved / 1e6:.0f} MB of weights, gradients, moments at {bandwidth / 1e9:.0f} GB/s\n"
          "      ms share calls  of a step")
    cuda = device.startswith("cuda")  # there the kernels alone
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not cuda or e.device_type.name == "CUDA"]
    total = sum(getattr(e, spent) for e in events)
    for e in sorted(events, key=lambda e: -getattr(e, spent))[:16]:
        us = getattr(e, spent)
        print(f"{us / PROFILED / 1e3:8.2f}{us / total:6.0%}{e.count / PROFILED:6.0f}  {e.key[:64]}")


def in_processes(jobs):
    """What measure() gives for the arguments of each job, each in a process of its own (memory and compilation are its
    alone), of which one works at a time."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers = [subprocess.Popen([sys.executable, __file__, "--worker", *job], **pipes) for job in jobs]
    results = [None] * len(jobs)

    def end_of_turn(i):
        line = next((line for line in workers[i].stdout if line.startswith(("TURN", "RESULT "))), None)
        if line is None:
            raise BadInput(f"{jobs[i][0]} did not run: see above")
        return line

    try:
        for i in range(len(jobs)):  # all have started before the first one works
            end_of_turn(i)
        while None in results:
            for i, worker in enumerate(workers):
                if results[i] is None:
                    worker.stdin.write("\n")
                    worker.stdin.flush()
                    line = end_of_turn(i)
                    if line.startswith("RESULT "):
                        results[i] = json.loads(line[7:])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return results


def by_length(models, keys):
    """Prints what longer rows cost: as many bytes a step in fewer rows, and one row written from its half on."""
    print(f"{'':12}{'bytes a row':>12}{'rows':>6}{'training, KB/s':>16}{'memory, MB':>12}{'reading half, ms':>18}"
          f"{'writing, ms a byte':>20}")
    for name in models:
        cfg = T.Config(**T.parse([name, *keys]))
        symbol = 4 if cfg.model == "gpt" else 1  # bytes of text, about
        for n_bytes in 1024, 4096, 16384:
            rows = max(1, cfg.batch_size * cfg.block_size * symbol // n_bytes)
            sizes = f"--block_size={n_bytes // symbol}", f"--batch_size={rows}"
            [r] = in_processes([[name, "--one_row", "--dataset=stdlib", *keys, *sizes]])
            print(f"{Path(name).stem:12}{n_bytes:12,}{rows:6}{r['training, KB/s']:16.2f}{r['peak memory, MB']:12,.0f}"
                  f"{r['reading half a row, 1 row, ms']:18.1f}{1 / r['writing after it, 1 row, KB/s']:20.2f}", flush=True)


def other_gpt2(peer, cfg, vocab_size, device):
    """nanoGPT's model from a clone of it, or transformers' GPT-2: the model, a training step and its generate()."""
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, vocab_size=vocab_size)
    if peer == "transformers":
        hf = need("transformers", peer)
        sizes |= dict(n_positions=cfg.block_size + 256, bos_token_id=None, eos_token_id=None)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).to(device)
        loss = lambda x, y: model(x, labels=x).loss
        more = dict(do_sample=True, top_k=0, pad_token_id=0)

        def generate(prompts, n):
            prompts = torch.stack(prompts)
            return model.generate(prompts, attention_mask=prompts >= 0, max_new_tokens=n, min_new_tokens=n, **more)[:, -n:]
    else:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(peer) / "model.py")
        nano = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nano)
        model = nano.GPT(nano.GPTConfig(**sizes, block_size=cfg.block_size, dropout=0.0, bias=False)).to(device)
        loss = lambda x, y: model(x, y)[1]
        generate = lambda prompts, n: model.generate(torch.stack(prompts), n, top_k=200)[:, -n:]
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), fused=True)
    cuda = device.startswith("cuda")  # where nanoGPT takes bf16 and compiles; elsewhere neither
    if cuda:
        model.compile()

    def step(x, y):
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            value = loss(x, y.contiguous())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step, generate


def compress(folder):
    """Bits per byte of the validation text in general compressors at their strongest setting."""
    meta = T.load_meta(Path(folder))
    ids = T.Data(Path(folder), "val", meta, 1).ids
    text = to_text(ids, meta["vocab"])
    print(f"{folder}: {len(text):,} bytes of validation text, in bits per byte")
    for name, packed in (("gzip -9", gzip.compress(text, 9)), ("bzip2 -9", bz2.compress(text, 9)),
                         ("xz -9e", lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))):
        print(f"{name:10}{8 * len(packed) / len(text):8.3f}")


def time_prepare(folder):
    """MB/s at cutting the training text of a dataset (of 20 MB at most): one core's, tiktoken's own, and prepare.py's, with
    reading, writing and all cores."""
    meta = T.load_meta(Path(folder))
    text = to_text(T.Data(Path(folder), "train", meta, 1).ids[:20_000_000], meta["vocab"])
    with tempfile.TemporaryDirectory() as temp:
        file = Path(temp) / "text.txt"
        file.write_bytes(text)
        from_file = partial(prepare, [str(file)], data_dir=temp)
        as_text, gpt2 = text.decode("utf-8", "replace"), tokenizer(gpt2_vocab())
        jobs = {
            "words, one core": lambda: encode(text), "prepare.py, words": from_file,
            "gpt2, one core": lambda: encode(text, "gpt2"), "prepare.py, gpt2": partial(from_file, patcher="gpt2"),
            "tiktoken alone, one core": lambda: gpt2.encode_ordinary(as_text),
        }
        figures = {}
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            figures[name] = len(text) / 1e6 / (time.perf_counter() - start)
    print(f"cutting {len(text) / 1e6:.1f} MB of text, MB/s")
    for name, speed in figures.items():
        print(f"{name:26}{speed:8.1f}")


def draw_sizes(figure=Path("images/sizes.svg")):
    """Draws the parameters of each shipped size and of its rival: in tables, and in layers."""
    plt = T.pyplot(figure)
    if plt is None:
        return
    plt.figure(figsize=(8, 3))
    names = [f"{kind}_{size}" for size in ("100m", "50m", "10m") for kind in ("gpt", "stlm")]
    for name in names:
        cfg = T.Config(**T.parse([f"config/{name}.py"]))
        with torch.device("meta"):  # shapes without memory
            model = T.build_model(asdict(cfg), None if cfg.model == "stlm" else range(50257))
        total, tables = (sum(p.numel() for p in ps) / 1e6 for ps in (model.parameters(), T.tables_of(model)))
        plt.barh(name, tables, color="C1", label="tables" if name == names[0] else None)
        plt.barh(name, total - tables, left=tables, color="C0", label="layers" if name == names[0] else None)
    plt.xlabel("million parameters")
    plt.legend()
    save_figure(plt, figure)


def save_figure(plt, figure):
    figure.parent.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "stlm"  # and no date: the same picture, the same file
    plt.savefig(figure, bbox_inches="tight", metadata={"Date": None})
    print(f"drawn: {figure}")


def validate(arguments):
    """bench.py --val: a line a dataset, a column a model: bits per byte on all of its validation text."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--block_size", type=int)
    args = parser.parse_args(arguments)
    models = {f: S.load(f, block_size=args.block_size) for f in args.folders if not (Path(f) / "meta.json").is_file()}
    device = T.choose_device("")  # where load() puts them
    autocast = T.choose_precision(device)[0]
    print(f"{'bits per byte of validation text':34}" + "".join(f"{f:>16}" for f in models))
    for folder in (f for f in args.folders if f not in models):
        meta, line = T.load_meta(Path(folder)), f"{folder:34}"
        for model in models.values():
            if model.text["vocab"] != meta["vocab"]:
                raise BadInput(f"{folder} is cut with another vocabulary than the model's: prepare it the same way")
            data = T.Data(Path(folder), "val", meta, model.config.block_size)
            line += f"{T.evaluate(model, data, max(1, 2**15 // data.N), device, autocast):16.4f}"
        print(line, flush=True)


NOISE = 0.05


def noisy(text, generator):
    """text (bytes) with NOISE of its bytes replaced by letters, the same ones whichever model reads them."""
    text = np.frombuffer(text, np.uint8).copy()
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    hit = generator.random(len(text)) < NOISE
    text[hit] = generator.choice(letters, hit.sum())
    return text.tobytes()


def finished_run(folder):
    """What the log and the checkpoint of one run say, and its bits per byte on validation text with noise."""
    checkpoint = T.load_checkpoint(folder / "ckpt.pt")
    log = T.read_log(folder)
    last = log[-1]
    if not last.get("all_of_val"):
        raise BadInput(f"{folder} is not finished: its log does not end with all of the validation text")
    cfg = T.Config(**checkpoint["config"])
    data_folder = T.find_data(cfg)
    meta = T.load_meta(data_folder)
    model = T.build_model(checkpoint["config"], meta["vocab"])
    model.load_state_dict(checkpoint["model"])
    device = T.choose_device(cfg.device)
    model.to(device)

    data, generator = T.Data(data_folder, "val", meta, cfg.block_size), np.random.default_rng(0)
    documents = np.split(data.ids, np.flatnonzero(data.ids == data.separator) + 1)  # each with its separator
    texts = [noisy(to_text(ids, meta["vocab"]), generator) for ids in documents if len(ids)]
    cut = [ids for text in texts for ids in (to_ids(text, meta["patcher"], meta["vocab"]), [data.separator])]
    data.ids = np.concatenate(cut).astype(np.uint16)
    noisy_bpb = T.evaluate(model, data, cfg.batch_size, device, T.choose_precision(device)[0])
    tables = sum(p.numel() for p in T.tables_of(model))
    curve = [(e["minutes"], e["val_bpb"]) for e in log if "val_bpb" in e]
    return curve, {
        "total": sum(p.numel() for p in model.parameters()) / 1e6, "tables": tables / 1e6, "MB seen": last["bytes"] / 1e6,
        "minutes": last["minutes"], "KB/s": last["bytes"] / last["minutes"] / 6e4, "bpb": last["val_bpb"],
        "noisy": noisy_bpb, "rise": noisy_bpb - last["val_bpb"],
    }


def compare(folders, figure=Path("images/runs.svg")):
    """Prints a line a model with the mean over its seeds, and draws their validation curves."""
    models = {}
    for folder in map(Path, folders):
        models.setdefault(folder.stem, []).append(finished_run(folder))
    means = {name: {k: statistics.mean(row[k] for _, row in runs) for k in runs[0][1]} for name, runs in models.items()}
    first = next(iter(means.values()))
    print(f"parameters in M; noisy: {NOISE:.0%} of the bytes replaced by letters; ratio: bpb over the first line's")
    print(f"{'':20}" + "".join(f"{k:>9}" for k in first) + f"{'seeds':>7}{'spread':>8}{'ratio':>7}")
    for name, row in means.items():
        bpbs = [run["bpb"] for _, run in models[name]]
        print(f"{name:20}" + "".join(f"{v:9.3f}" for v in row.values())
              + f"{len(bpbs):7}{max(bpbs) - min(bpbs):8.3f}{row['bpb'] / first['bpb']:7.3f}")
    plt = T.pyplot(figure)
    if plt is None:
        return
    plt.figure(figsize=(8, 4.5))
    for i, (name, runs) in enumerate(models.items()):
        for seed, (curve, _) in enumerate(runs):
            x, y = zip(*curve)
            plt.plot(x, y, ".-", color=f"C{i}", linewidth=2 if i == 0 else 1, label=None if seed else name)
    best = min(row["bpb"] for row in means.values())
    plt.ylim(0.98 * best, 1.35 * best)
    plt.xlabel("minutes of training")
    plt.ylabel("bits per byte of validation text")
    plt.legend()
    plt.grid(alpha=0.3)
    save_figure(plt, figure)


# ----------------------------------------------------------------------------------------------------------------------
# the field's benchmarks


class Harness:
    """What lm-evaluation-harness asks of a model (its class LM), for a model from sample.load().

    The likelihood of a continuation is that of its bytes: they may begin and end inside a patch. Whether the context's
    last byte ends its patch is decided by the continuation, so it counts; whether the last byte of all does is left open.
    (For the rival, context and continuation are cut into tokens one by one.)
    """

    def __init__(self, model):
        from tqdm import tqdm  # lm-eval needs it too

        super().__init__()
        self.model, self.vocab, self.progress = model, model.text["vocab"], partial(tqdm, disable=None)

    def rows(self, context, continuation):
        """Windows of at most block_size that end with the text and cover the continuation: x, y and how many of the
        last positions of y count. What lies further left is cut off."""
        if self.vocab is None:
            ids = S.document(self.model, context + continuation)
            n = len(continuation) + bool(context)  # and the flag of the context's last byte
        else:
            cut = [to_ids(text, None, self.vocab) for text in (context, continuation) if text]
            ids = np.concatenate([[separator_of(self.vocab)], *cut]).astype(np.int64)
            ids, n = torch.from_numpy(ids).to(self.model.wte.weight.device), len(cut[-1])
        N = self.model.config.block_size
        for end in range(len(ids), len(ids) - n, -N):
            begin = max(0, end - 1 - N)
            yield ids[begin : end - 1], ids[begin + 1 : end], min(N, n - (len(ids) - end))

    @torch.no_grad()
    def loglikelihood(self, requests, batched=True):
        """(nats, is every byte the likeliest?) for each request's (context, continuation)."""
        rows = []  # (request, x, y, how many positions count, is the first of them a flag alone?, is the last its end?)
        for i, request in enumerate(requests):
            context, continuation = (text.encode("utf-8", "surrogatepass") for text in request.args)
            windows = list(self.rows(context, continuation)) if continuation else []
            for k, (x, y, n) in enumerate(windows):
                rows.append((i, x, y, n, k == len(windows) - 1 and bool(context), k == 0))
        rows.sort(key=lambda row: len(row[1]))  # little padding
        nats, greedy, bar = [0.0] * len(requests), [True] * len(requests), self.progress(total=len(rows))
        room = 2**24 // self.model.wte.weight.size(0)  # positions whose logits are held at a time
        while rows:
            n_rows = max(1, room // len(rows[-1][1])) if batched else 1
            batch, rows = rows[-n_rows:], rows[:-n_rows]
            x = torch.nn.utils.rnn.pad_sequence([row[1] for row in batch], batch_first=True)
            logp = self.model(x)[0].float().log_softmax(-1)  # (B, N, vocabulary)
            for (i, _, y, n, flag, end), row in zip(batch, logp):
                row, y = row[len(y) - n : len(y)], y[-n:]
                each = row.gather(1, y[:, None])[:, 0]
                same = row.argmax(1) == y
                if self.vocab is None:
                    both = torch.stack([row.gather(1, y[:, None] % 256), row.gather(1, y[:, None] % 256 + 256)]).logsumexp(0)
                    same = row.argmax(1) % 256 == y % 256
                    if flag:  # its byte is given
                        each[0] -= both[0, 0]
                        same[0] = True
                    if end:
                        each[-1] = both[-1, 0]
                nats[i] += each.sum().item()
                greedy[i] &= bool(same.all())
            bar.update(len(batch))
        bar.close()
        return list(zip(nats, greedy))

    def loglikelihood_rolling(self, requests):
        """The nats of each whole text, as a document of its own."""
        texts = [request.args[0].encode("utf-8", "surrogatepass") for request in requests]
        nats = lambda text: -float(S.score(self.model, text)[0].sum()) * math.log(2) if text else 0.0
        return [nats(text) for text in self.progress(texts)]

    def generate_until(self, requests):
        """Text after each context, up to a stop string or max_gen_toks tokens, taken as 4 bytes each; greedy by default."""
        texts = []
        for request in self.progress(requests):
            context, options = request.args
            stops = options.get("until") or []
            stops, text = [stops] if isinstance(stops, str) else stops, ""
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            for piece in S.stream(self.model, context or "\n", 4 * options.get("max_gen_toks", 64), temperature, seed=0):
                text += piece
                if any(stop in text for stop in stops if stop):
                    break
            texts.append(min((text.split(stop)[0] for stop in stops if stop), key=len, default=text))
        return texts


def evaluate_tasks(arguments):
    """bench.py --tasks: the harness's table on the terminal and its results in out_dir/lm_eval.json."""
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--out_dir", default="out/quick")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--include_path")
    parser.add_argument("--device", default="")
    args = parser.parse_args(arguments)
    need("lm_eval", "--tasks", "lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    model = S.load(args.out_dir, args.device)
    manager, tasks = TaskManager(include_path=args.include_path), args.tasks.split(",")
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise BadInput(f"--tasks: lm-eval knows no task {', '.join(unknown)}; lm-eval ls tasks lists them, and "
                       "--include_path=DIR adds a folder of your own")
    adapter = type("Adapter", (Harness, LM), {})(model)
    results = simple_evaluate(adapter, tasks=tasks, limit=args.limit, task_manager=manager, log_samples=False)
    print(make_table(results))
    path = Path(args.out_dir if Path(args.out_dir).is_dir() else ".") / "lm_eval.json"
    with whole_file(path) as file:
        file.write(json.dumps({k: results[k] for k in ("results", "n-samples", "versions")}, indent=1, default=str).encode())
    print(f"written: {path}")


def main():
    if sys.argv[1:2] == ["--runs"]:
        return compare(sys.argv[2:])
    if sys.argv[1:2] == ["--val"]:
        return validate(sys.argv[2:])
    if sys.argv[1:2] == ["--sizes"]:
        return draw_sizes()
    if any(arg.startswith("--tasks") for arg in sys.argv[1:]):
        return evaluate_tasks(sys.argv[1:])
    models = [arg for arg in sys.argv[1:] if not arg.startswith("--")] or ["config/stlm_10m.py"]
    keys = [arg for arg in sys.argv[1:] if arg.startswith("--")]
    if "--worker" in keys:
        keys.remove("--worker")
        batches = (1,) if "--one_row" in keys else (1, 64)
        keys = [key for key in keys if key != "--one_row"]
        end_turn()  # the first begins when all have started
        print("RESULT " + json.dumps(measure(T.parse(models[:1] + keys), batches, *models[1:])))
        return
    if "--help" in keys:
        print(__doc__)
        return
    if keys and keys[0].startswith("--compress="):
        return compress(keys[0].removeprefix("--compress="))
    if keys and keys[0].startswith("--prepare="):
        return time_prepare(keys[0].removeprefix("--prepare="))
    if len(models) == 1:
        models.append(models[0].replace("stlm_", "gpt_"))
    if keys and keys[0] == "--lengths":
        return by_length(models, keys[1:])
    if keys and keys[0] == "--profile":
        return profile(T.parse([models[0], "--dataset=stdlib", *keys[1:]]))
    text, jobs = [key for key in keys if key.startswith("--dataset=")], []
    for i, name in enumerate(models):
        if name == "transformers" or (Path(name) / "model.py").is_file():
            worker = [config, name]  # other projects' GPT-2, of the sizes of the config before it
        else:
            config, worker = name, [name]
        options = ["--dataset=stdlib", *(keys if i else text)]
        T.check_sizes(asdict(T.Config(**T.parse([config, *options]))))  # before any work
        jobs.append([*worker, *options])
    ours, *rivals = in_processes(jobs)
    print(f"{'':45}{Path(models[0]).stem:>12}" + "".join(f"{Path(name).stem:>14}{'ratio':>7}" for name in models[1:]))
    for row, a in ours.items():
        cells = (f" {r[row]:13,.2f} {a / r[row]:6.2f}" if row in r else f"{'-':>14}{'':7}" for r in rivals)
        print(f"{row:45}{a:12,.2f}" + "".join(cells))


if __name__ == "__main__":
    run(main)
