"""
Measures models side by side: speed, memory, bits per byte, and the field's benchmarks.

    python bench.py speed --dataset=novels              # config/stlm_10m.py and config/gpt_10m.py
    python bench.py speed config/gpt_10m.py ../nanoGPT transformers     # in the sizes of gpt_10m
    python bench.py runs out/stlm.1 out/stlm.2 out/bpe.1 out/bpe.2      # finished runs
    python bench.py val out/quick data/stdlib data/mine                 # bits per byte
    python bench.py tasks blimp,hellaswag --out_dir=out/quick           # by the package lm-eval
    python bench.py compress data/stdlib                                # by gzip, bzip2 and xz
    python bench.py sizes                                               # where the parameters lie
"""
import argparse
import bz2
import gzip
import importlib.util
import json
import lzma
import multiprocessing
import resource
import signal
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from timeit import repeat

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import sample as S
import train as T
from model import GPT, STLM
from prepare import BadInput, Parser, decode, encode, run, whole_file


# --- speed ----------------------------------------------------------------------------------------
STEPS = 3  # of training in a turn
TURNS = 4  # the first is for warming up; after the last, some text is written


def speed(arguments):
    """Prints a column for each model; keys of train.py change the config files."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    keys = [argument for argument in arguments if argument.startswith("--")]
    jobs, cfg = [], None
    for name in names or ["config/stlm_10m.py", "config/gpt_10m.py"]:
        if name.endswith(".py"):
            given, hooks = T.parse([name, "--dataset=stdlib", *keys])
            if hooks:
                raise BadInput(f"{name}: expected a config file without edit() and loss()")
            cfg, _ = T.settle(given, hooks)
        elif cfg is None or not (name == "transformers" or Path(name, "model.py").is_file()):
            raise BadInput(f"{name}: expected CONFIG.py, after it a nanoGPT folder or transformers")
        elif name == "transformers":
            import transformers  # noqa: F401 - a missing one is said before any work
        jobs.append((name, cfg))
    for _, cfg in jobs:
        T.find_data(cfg)  # may prepare it

    # they take turns, so that a machine whose speed changes does so for all; each in a process of
    # its own, so that its memory and its compilation are its alone
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in jobs]
    columns = [{} for _ in jobs]
    for i in tqdm([*range(len(jobs))] * TURNS, desc="measuring"):
        try:
            columns[i] |= pools[i].submit(take_turn, *jobs[i]).result()
        except BrokenExecutor:
            raise BadInput(f"{jobs[i][0]}: out of memory, it seems; try a smaller --batch_size")

    names = [Path(name).stem for name, _ in jobs]
    print(f"{'':28}{names[0]:>12}" + "".join(f"{name:>14} ratio" for name in names[1:]))
    for key in columns[0]:
        first, *others = (column.get(key, np.nan) for column in columns)
        cells = "".join(f"{other:14,.2f} {first / other:5.2f}" for other in others)
        print(f"{key:28}{first:12,.2f}{cells.replace('nan', '  -')}")


def take_turn(name, cfg):
    global turns
    if "turns" not in globals():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
        turns = measure(name, cfg)
    return next(turns)


def measure(name, cfg):
    """Yields {}, after the last turn {figure: value}: of our model or another, in its sizes."""
    folder, meta = T.find_data(cfg)
    data = T.Data(folder, "train", meta, cfg.block_size)
    device = T.choose_device(cfg.device)
    ours = name.endswith(".py")
    if ours:
        model = T.new_model(cfg, meta).to(device)
        loss_of, generate = lambda model, x, y: model(x, y), model.generate
        dtype = T.choose_dtype(device)
        optimizers = T.make_optimizers(model, cfg, dtype)
    else:  # trained as nanoGPT does it
        model, loss_of, generate = other_gpt2(name, cfg, len(meta["vocab"] or range(512)), device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        optimizers = [torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), fused=True)]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    loss_of = autocast(loss_of)

    # training
    steps = []  # (seconds, bytes of text)
    for i in range(TURNS * STEPS):
        if i > 0 and i % STEPS == 0:
            yield {}
        start = time.perf_counter()
        x, y = (ids.to(device) for ids in data.sequences(i * cfg.batch_size, cfg.batch_size, 0))
        if i == 0 and ours and cfg.compile:
            T.compile_model(model, loss_of, x, y)
        loss = loss_of(model, x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for the device
        steps.append((time.perf_counter() - start, data.count_bytes(y.cpu())))
    seconds, n_bytes = np.median(steps[STEPS:], axis=0)
    memory = torch.cuda.max_memory_allocated()  # of tensors; without CUDA, of the whole process:
    memory = memory or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "bytes of text a step": n_bytes,
        "training, KB/s": n_bytes / seconds / 1e3,
        "training, ms a step": 1e3 * seconds,
        "first step (compilation), s": steps[0][0],
        "peak memory, MB": memory / 1e6,
    }

    # generation, not compiled: half a sequence is given
    torch.compiler.set_stance("force_eager")
    half, bytes_of_id = cfg.block_size // 2, n_bytes / y.numel()
    n_new = min(half - 1, round(256 / bytes_of_id))  # 256 bytes, if there is room
    cases = [(1, 3), (64, 1)]  # sequences, tries; nanoGPT's 64 would take minutes
    for n, tries in cases if ours or name == "transformers" else cases[:1]:
        prompts = data.sequences(0, n, seed=0)[0][:, :half].to(device)
        generate(prompts, 2)  # a first call is slower
        reading, both = (
            np.median(repeat(lambda: generate(prompts, k).cpu(), repeat=tries, number=1))
            for k in (1, 1 + n_new))
        figures[f"reading, {n} at once, ms"] = 1e3 * reading
        figures[f"writing, {n} at once, KB/s"] = n * n_new * bytes_of_id / (both - reading) / 1e3
    yield figures


def other_gpt2(name, cfg, vocab_size, device):
    """GPT-2 of another project: the model, loss_of(model, x, y) and generate(prompts, max_new)."""
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, vocab_size=vocab_size)
    if name == "transformers":
        import transformers

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            **sizes, n_positions=cfg.block_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None))
        loss_of = lambda model, x, y: model(x, labels=x).loss  # it shifts them itself
        generate = lambda ids, n: model.generate(ids, max_new_tokens=n, do_sample=True, top_k=0)
    else:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(name) / "model.py")
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        model = nanogpt.GPT(nanogpt.GPTConfig(
            **sizes, block_size=cfg.block_size, dropout=0.0, bias=False))
        loss_of, generate = lambda model, x, y: model(x, y)[1], model.generate
    if device.type == "cuda":
        model.compile()
    return model.to(device), loss_of, generate


# --- finished runs --------------------------------------------------------------------------------
def runs(folders, figure):
    """Prints a line a model and draws its validation curves, as finished runs have logged them.
    Folders that differ only after their last dot are seeds of one model: the line is their mean."""
    models, bpbs, panels = {}, [], Figure((10, 4)).subplots(1, 2, sharey=True)
    for folder in map(Path, folders):
        models.setdefault(folder.stem, []).append(read_run(folder))
    print(f"{'':20}total, M tables, M   MB read   minutes      KB/s       bpb  seeds spread  ratio")
    for i, (name, seeds) in enumerate(models.items()):
        rows = np.array([row for row, _ in seeds])
        bpbs.append(rows[:, -1].mean())
        print(f"{name:18}" + "".join(f"{value:10.3f}" for value in rows.mean(axis=0))
              + f"{len(rows):7}{np.ptp(rows[:, -1]):7.3f}{bpbs[-1] / bpbs[0]:7.3f}")
        for seed, (_, (*spent, curve)) in enumerate(seeds):
            for axes, x in zip(panels, spent):
                axes.plot(x, curve, ".-", color=f"C{i}", label="_" if seed else name)
    for axes, spent in zip(panels, ("minutes of training", "MB of text read")):
        axes.set(xlabel=spent, ylabel="bits per byte", ylim=(0.98 * min(bpbs), 1.35 * min(bpbs)))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    save(axes, figure)


def read_run(folder):
    """A run's row of the table, and its validation curve: minutes, MB, bits per byte (3, n)."""
    folder, edit = S.folder_and_edit(folder)
    model, _ = T.load_checkpoint(folder / "ckpt.pt", edit)
    path, log = folder / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines():
        try:
            log.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            print(f"{path}: a torn line is left out: {line[:50]}")
    if not log or not log[-1].get("all_of_val"):
        raise BadInput(f"{folder} is not finished: its last evaluation, of all text, is missing")
    last, tables = log[-1], millions(model, PARTS["n-grams"] + PARTS["vocabulary"])
    speed = last["bytes"] / 1e3 / (60 * last["minutes"])
    row = millions(model), tables, last["bytes"] / 1e6, last["minutes"], speed, last["val_bpb"]
    return row, np.array([(entry["minutes"], entry["bytes"] / 1e6, entry["val_bpb"])
                          for entry in log if "val_bpb" in entry]).T


def save(axes, path):
    axes.legend()
    matplotlib.rcParams["svg.hashsalt"] = "stlm"  # and no date: the same figure, the same file
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        axes.figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    print(f"drawn: {path}")


# --- where the parameters lie ---------------------------------------------------------------------
PARTS = {  # how the names of their parameters begin
    "transformer": ("to_patches.", "blocks.", "to_bytes."),
    "byte layers": ("encoder.", "decoder.", "start", "ngram_query.", "embed.ngram_up."),
    "n-grams": ("embed.ngram.",),
    "vocabulary": ("embed.byte.", "embed.place.", "embed.match.", "wte."),
}


def millions(model, beginnings=""):
    """Millions of the parameters whose names begin so."""
    parameters = model.named_parameters()
    return sum(p.numel() for name, p in parameters if name.startswith(beginnings)) / 1e6


def sizes(figure):
    """Prints and draws the parameters of the shipped models, part by part."""
    print(f"million parameters{'total':>8}" + "".join(f"{part:>13}" for part in PARTS))
    table = {}
    for name in "quick gpt_quick stlm_10m gpt_10m stlm_50m gpt_50m stlm_100m gpt_100m".split():
        cfg = T.Config(**T.parse([f"config/{name}.py"])[0])
        cfg.vocab_size = {"bytes": 512, "bpe:4096": 4096, "gpt2": 50_257}[cfg.tokenizer]
        with torch.device("meta"):  # shapes without memory
            model = GPT(cfg) if cfg.model == "gpt" else STLM(cfg)
        table[name] = [millions(model, beginnings) for beginnings in PARTS.values()]
        print(f"{name:18}{millions(model):8.2f}" + "".join(f"{n:13.2f}" for n in table[name]))
    left, axes = 0, Figure().subplots()
    for part, n in zip(PARTS, np.transpose([*table.values()])):
        axes.barh([*table], n, left=left, label=part)
        left = left + n
    axes.set(xlabel="million parameters")
    save(axes, figure)


# --- validation text ------------------------------------------------------------------------------
def val(names, block_size, noise):
    """Prints a line a dataset, a column a model: bits per byte on all of its validation text."""
    if not 0 <= noise <= 1:
        raise BadInput(f"--noise={noise}: expected 0 to 1")
    models, datasets = {}, {}
    for path in map(Path, names):
        if (path / "meta.json").is_file():
            datasets[path] = T.load_meta(path)
        elif path.exists():
            models[path] = S.load(path, block_size=block_size)
        else:
            raise BadInput(f"{path}: no such file or folder; expected models and datasets")
    if not (models and datasets):
        raise BadInput("val: expected at least one model and at least one dataset")

    device = T.choose_device("")  # where load() puts models
    dtype = T.choose_dtype(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    print(f"{'bits per byte':30}" + "".join(f" {path!s:>19}" for path in models))
    for folder, meta in datasets.items():
        noisy_ids = add_noise(folder, meta, noise) if noise else None
        line = f"{folder!s:30}"
        for path, model in models.items():
            if model.text["vocab"] != meta["vocab"]:
                raise BadInput(f"{folder} has another vocabulary than {path}: prepare it likewise")
            data = T.Data(folder, "val", meta, model.config.block_size)
            data.ids = noisy_ids if noise else data.ids
            batch_size = max(1, 2**15 // data.block_size)
            line += f"{T.evaluate(model, data, batch_size, autocast):20.4f}"
        print(line, flush=True)


def add_noise(folder, meta, noise):
    """The ids of a dataset's validation text with this share of its bytes replaced by letters, the
    same whichever way it is cut. Writes that text too, a byte 0xFF after each document."""
    rng = np.random.default_rng(0)
    data, ids = T.Data(folder, "val", meta, 1), []
    path = folder.with_name(f"{folder.name}-noisy-{noise}.txt")
    with whole_file(path) as file:
        for document in np.split(data.ids, np.flatnonzero(data.ids == data.separator) + 1)[:-1]:
            text = np.frombuffer(decode(document, meta["vocab"]), np.uint8).copy()
            hit = rng.random(len(text)) < noise
            text[hit] = rng.integers(ord("a"), ord("z") + 1, hit.sum())
            file.write(text.tobytes() + b"\xff")
            ids += [encode(text.tobytes(), meta["patcher"], meta["vocab"]), [data.separator]]
    return np.concatenate(ids).astype(np.uint16)


def compress(folder):
    """Prints the bits per byte of a dataset's validation text in general compressors."""
    meta = T.load_meta(Path(folder))
    text = decode(T.Data(Path(folder), "val", meta, 1).ids, meta["vocab"])
    print(f"{folder}: {len(text):,} bytes of validation text, in bits per byte")
    for name, packed in {"gzip -9": gzip.compress(text, 9), "bzip2 -9": bz2.compress(text, 9),
                         "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}.items():
        print(f"{name:10}{8 * len(packed) / len(text):8.3f}")


# --- the field's benchmarks -----------------------------------------------------------------------
class Harness:
    """What lm-evaluation-harness asks of a model (its class LM), for a model from sample.load()."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loglikelihood(self, requests):
        """(nats, is every byte the likeliest?) for each request's (context, continuation)."""
        return [self.score(*request.args) for request in tqdm(requests, disable=None)]

    @torch.no_grad()
    def score(self, *texts):
        """The same of one pair. The chain rule holds wherever a text is split, also in a patch."""
        context, continuation = (text.encode("utf-8", "surrogatepass") for text in texts)
        if not continuation:
            return 0.0, True
        ids, n = S.document(self.model, context + continuation), len(continuation)
        n_bytes = 256
        if isinstance(self.model, GPT):  # the two are cut one by one; a token counts as one "byte"
            before = S.document(self.model, context) if context else ids[:1]
            after = S.document(self.model, continuation)[1:]  # without the separator
            ids, n = torch.cat([before, after]), len(after)
            n_bytes = self.model.config.vocab_size

        # windows of block_size, the last first, from the byte before the continuation on
        N, scores = self.model.config.block_size, []
        for end in range(len(ids), max(1, len(ids) - n - 1), -N):
            window = ids[max(0, end - 1 - N) : end]
            x, y = window[:-1], window[1:, None]
            logp = self.model(x[None])[0].float().log_softmax(-1)       # (N, vocab_size)
            of_bytes = logp.unflatten(1, (-1, n_bytes)).logsumexp(1)    # (N, n_bytes)
            right = logp.argmax(1, keepdim=True) % n_bytes == y % n_bytes
            columns = logp.gather(1, y), of_bytes.gather(1, y % n_bytes), right
            scores.insert(0, torch.cat(columns, dim=1))
        of_id, of_byte, right = torch.cat(scores).T

        # whether the last byte of all ends its patch is left open; whether the context's last byte
        # does is decided by the continuation, so that counts, but not that byte
        nats = of_id[-n:-1].sum() + of_byte[-1]
        if context:
            nats += of_id[-n - 1] - of_byte[-n - 1]
        return nats.item(), bool(right[-n:].all())

    def loglikelihood_rolling(self, requests):
        """The nats of each whole text, as a document of its own."""
        return [self.score("", *request.args)[0] for request in tqdm(requests, disable=None)]

    def generate_until(self, requests):
        """Greedy text after each context, up to a stop string or 4 * max_gen_toks bytes."""
        texts = []
        for request in tqdm(requests, disable=None):
            context, options = request.args
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            n_bytes = 4 * options.get("max_gen_toks", 64)
            text = "".join(S.stream(self.model, context or "\n", n_bytes, temperature=0))
            texts.append(min([text, *(text.split(stop)[0] for stop in stops if stop)], key=len))
        return texts


def tasks(names, out_dir, limit, include_path, device):
    """Prints the harness's table and writes its results to out_dir/lm_eval.json."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager, names = TaskManager(include_path=include_path), names.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise BadInput(f"lm-eval knows no task {', '.join(unknown)}; lm-eval ls tasks lists them, "
                       "and --include_path=DIR adds a folder of your own")
    model = type("Adapter", (Harness, LM), {})(S.load(out_dir, device))
    results = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager)
    print(make_table(results))
    results = {key: results[key] for key in ("results", "n-samples", "versions")}
    path = Path(out_dir if Path(out_dir).is_dir() else ".", "lm_eval.json")
    with whole_file(path) as file:
        file.write(json.dumps(results, indent=1, default=str).encode())
    print(f"written: {path}")


# --- the command line -----------------------------------------------------------------------------
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    add = modes.add_parser("speed", help="training and writing; also --KEY=VALUE").add_argument
    add("arguments", nargs="*", metavar="MODEL", help="config file, nanoGPT folder, transformers")
    add = modes.add_parser("runs", help="finished runs, and a figure").add_argument
    add("folders", nargs="+", metavar="OUT_DIR")
    add("--figure", default="images/runs.svg", help="where to draw it, as SVG")
    add = modes.add_parser("val", help="bits per byte of validation text").add_argument
    add("names", nargs="+", metavar="MODEL_OR_DATASET", help="folders, in any order")
    add("--block_size", type=int, help="how far models look back; default: as in training")
    add("--noise", type=float, default=0.0, help="share of bytes to become letters, kept in a file")
    add = modes.add_parser("tasks", help="the field's benchmarks").add_argument
    add("names", metavar="NAME,NAME", help="as lm-eval ls tasks lists them")
    add("--out_dir", default="out/quick", help="a training run's folder, or a checkpoint file")
    add("--limit", type=int, help="documents of each task")
    add("--include_path", help="a folder with tasks of your own")
    add("--device", default="", help="cuda, mps or cpu")
    modes.add_parser("compress", help="general compressors").add_argument("folder")
    add = modes.add_parser("sizes", help="where the parameters lie, and a figure").add_argument
    add("--figure", default="images/sizes.svg", help="where to draw it, as SVG")

    args, keys = parser.parse_known_args()
    if args.mode == "speed":
        args.arguments += keys
    elif keys:
        parser.error(f"{args.mode}: unknown argument {keys[0]}")
    options = vars(args)
    globals()[options.pop("mode")](**options)


if __name__ == "__main__":
    run(main)
