"""
Measures training and generation of an STLM beside the rival GPT of the same total size, in one run on one machine.

    python bench.py                                        # config/stlm_10m.py and config/gpt_10m.py
    python bench.py config/stlm_50m.py                     # and config/gpt_50m.py
    python bench.py config/stlm_10m.py --tokenizer=bpe:4096 --n_embd=320 --n_layer=7    # another rival
    python bench.py --compress=data/stdlib                 # bits per byte of general compressors on the same text

Both read the standard library's source, so no download is needed; keys after the configs change the rival. Each model
runs in a process of its own, one after the other. Figures are medians; the last column is ours over the rival's.
"""
import bz2
import gzip
import json
import lzma
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import train as T
from prepare import BadInput, run, to_text

STEPS, WARMUP, NEW_BYTES = 12, 3, 256


def measure(given):
    """Figures of one model: a dict of row -> value."""
    cfg = T.Config(**given)
    device = T.choose_device(cfg.device)
    folder = T.find_data(cfg)
    meta = T.load_meta(folder)
    cfg.max_patches = T.patches_a_row(cfg, meta)
    data = T.Data(folder, "train", meta, cfg.block_size)
    autocast, precision, peak = T.choose_precision(device)
    torch.manual_seed(0)
    model = T.build_model(asdict(cfg), meta["vocab"]).to(device)
    optimizers = T.make_optimizers(model, cfg)
    if cfg.compile and not T.why_no_compile(device):
        T.compile_blocks(model)

    times, counts = [], 0
    for i in range(WARMUP + STEPS):
        T.synchronize(device)
        start = time.perf_counter()
        x, y = data.training_rows(i * cfg.batch_size, cfg.batch_size, seed=0)
        T.take_step(model, optimizers, [(x.to(device), y.to(device))], autocast, 0.1)
        T.synchronize(device)
        if i < WARMUP:
            first = time.perf_counter() - start if i == 0 else first
            continue
        times.append(time.perf_counter() - start)
        counts = counts + data.count(y)
    n_bytes, n_patches, n_symbols = map(int, counts)
    step, flops = statistics.median(times), T.model_flops(model, n_symbols, n_patches)
    cuda = device.startswith("cuda")
    memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    model.eval()
    prompt = data.check(data.ids[: cfg.block_size // 2]).to(device)
    speeds = []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(4):
            T.synchronize(device)
            start = time.perf_counter()
            ids = model.generate([prompt], NEW_BYTES, generator=torch.Generator(device).manual_seed(0))
            T.synchronize(device)
            speeds.append(int(data.n_bytes[ids.cpu().numpy()].sum()) / (time.perf_counter() - start))
    return {
        "parameters, M": sum(p.numel() for p in model.parameters()) / 1e6,
        "bytes of text a step": n_bytes / STEPS,
        "training, KB/s": n_bytes / STEPS / step / 1e3,
        "training, ms a step": step * 1e3,
        f"MFU, % of {peak / 1e9:,.0f} GFLOP/s ({precision})": 100 * flops / STEPS / step / peak,
        "first step, s (compilation)": first,
        "peak memory, MB": memory / 1e6,
        "generation, one row, KB/s": statistics.median(speeds[1:]) / 1e3,
    }


def compress(folder):
    """Bits per byte of the validation text in general compressors at their strongest setting."""
    meta = T.load_meta(Path(folder))
    ids = T.Data(Path(folder), "val", meta, 1).ids
    text = to_text(ids, meta["vocab"])
    print(f"{folder}: {len(text):,} bytes of validation text, in bits per byte")
    for name, packed in (("gzip -9", gzip.compress(text, 9)), ("bzip2 -9", bz2.compress(text, 9)),
                         ("xz -9e", lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))):
        print(f"{name:10}{8 * len(packed) / len(text):8.3f}")


def main():
    files = [arg for arg in sys.argv[1:] if not arg.startswith("--")] or ["config/stlm_10m.py"]
    keys = [arg for arg in sys.argv[1:] if arg.startswith("--")]
    if "--worker" in keys:
        keys.remove("--worker")
        print("RESULT " + json.dumps(measure(T.parse(files + keys))))
        return
    if "--help" in keys:
        print(__doc__)
        return
    if keys and keys[0].startswith("--compress="):
        return compress(keys[0].removeprefix("--compress="))
    if len(files) == 1:
        files.append(files[0].replace("stlm_", "gpt_"))
    results = []
    for i, file in enumerate(files):
        T.parse([file])  # refuses a missing file before any work
        command = [sys.executable, __file__, "--worker", file, "--dataset=stdlib", *(keys if i else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not lines:
            raise BadInput(f"{file} did not run: see above")
        results.append(json.loads(lines[0][7:]))
    print(f"{'':42}" + "".join(f"{Path(f).stem:>12}" for f in files) + f"{'ratio':>9}")
    for row, rival_row in zip(*results):
        a, b = results[0][row], results[1][rival_row]
        print(f"{row:42}{a:12,.2f}{b:12,.2f}{a / b:9.2f}")


if __name__ == "__main__":
    run(main)
