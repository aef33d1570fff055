"""The model's promises: exactly causal, exact likelihoods, exact pooling, exact caches."""
import runpy
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, prose, random_model, symbols

from model import GPT, LIKELIEST, PLACES, STLM, STLMConfig, attend, last_follower, likeliest, pick
from prepare import encode
from train import why_no_compile


def changed_before(model, a, b, j):
    """The largest change of logits before position j when symbols a turn into b, which differ from j on."""
    assert (a[:j] == b[:j]).all() and a[j] != b[j]
    with torch.no_grad():
        la, lb = model(a[None])[0][0], model(b[None])[0][0]
    assert (la[j:] - lb[j:]).abs().max() > 1e-3  # the edit is seen at all
    return (la[:j] - lb[:j]).abs().max().item()


@pytest.mark.parametrize("patcher", ["words", "gpt2", "fixed:1", "fixed:4"])
def test_causal_for_every_patcher(patcher, request):
    if patcher == "gpt2":
        request.getfixturevalue("gpt2")
    model = random_model(max_patches=40)
    text = torch.from_numpy(encode(prose(64), patcher).astype("int64"))[:64]
    for j in range(1, 64, 3):
        for new in (symbols(64, seed=j), text ^ 256, text + 1 - 2 * (text % 2)):  # bytes and boundaries; boundaries; bytes
            edited = torch.cat([text[:j], new[j:]])
            if edited[j] != text[j]:
                assert changed_before(model, text, edited, j) < 1e-5


@pytest.mark.parametrize("max_patches", [1, 3, 16])
def test_causal_past_max_patches(max_patches):
    model = random_model(max_patches=max_patches)
    a = symbols(64, rate=0.5)
    for j in range(1, 64, 5):
        assert changed_before(model, a, torch.cat([a[:j], a[j:] ^ 257]), j) < 1e-5


@pytest.mark.parametrize("window", [0, 3])
def test_likelihood_is_the_chain_rule(window):
    """The loss of each symbol equals -log p(symbol | the prefix alone), and its sum the loss of the text."""
    model, text = random_model(window=window), symbols(60)
    x, y = text[:-1], text[1:]
    with torch.no_grad():
        losses = model(x[None], y[None], reduction="none")[1]
        for i in range(len(x)):
            logits = model(x[None, : i + 1])[0][0, -1]
            assert torch.allclose(losses[i], -logits.log_softmax(-1)[y[i]], atol=1e-4)
            assert logits.softmax(-1).sum().item() == pytest.approx(1)  # over all 512 symbols: a true distribution
        assert losses.sum().item() == pytest.approx(model(x[None], y[None], reduction="sum")[1].item(), rel=1e-5)
        assert losses.mean().item() == pytest.approx(model(x[None], y[None])[1].item(), rel=1e-5)


@pytest.mark.parametrize("max_patches", [4, 16, 64])
def test_pooling_against_a_slow_loop(max_patches):
    """The whole forward pass, with pooling and unpooling spelled out byte by byte."""
    model = random_model(max_patches=max_patches)
    rows = torch.stack([symbols(64, rate, seed=7) for rate in (0.0, 0.1, 0.5, 1.0)])
    with torch.no_grad():
        fast = model(rows)[0]
        for row, logits in zip(rows, fast):
            (z,), open_patch, _ = model.encode(row[None])
            means, begin = [], 0
            for i, symbol in enumerate(row.tolist()):
                if symbol >= 256 and len(means) < max_patches:
                    means.append(z[begin : i + 1].mean(0))
                    begin = i + 1
            h = model.core(torch.stack(means)[None], model.rope[:, : len(means)])[0] if means else None
            received, n_closed, n_open = [], 0, 0
            for symbol in row.tolist():
                n_closed = min(n_closed + (symbol >= 256), max_patches)
                n_open = 0 if symbol >= 256 else n_open + 1
                whole = h[n_closed - 1] if n_closed else model.start
                received.append(whole.view(PLACES, -1)[min(n_open, PLACES - 1)])
            slow = model.decode((z + torch.stack(received))[None], open_patch)[0]
            assert torch.allclose(slow, logits, atol=1e-4)


def test_overflow_keeps_the_last_patch():
    """Past max_patches a boundary changes nothing but the symbol itself: the transformer runs no further."""
    model, row = random_model(max_patches=4), symbols(64, rate=0.5)
    roomy = random_model(max_patches=64)  # the same weights
    fifth = (row >= 256).nonzero()[4].item()
    with torch.no_grad():
        tight, free = model(row[None])[0][0], roomy(row[None])[0][0]
    assert torch.allclose(tight[:fifth], free[:fifth], atol=1e-4)
    assert (tight[fifth:] - free[fifth:]).abs().max() > 1e-3


@torch.no_grad()
def test_what_followed_before():
    """The symbol after the last earlier place with the same last n symbols, against a search by hand."""
    row = torch.randint(97, 99, (64,), generator=torch.Generator().manual_seed(0))
    before = [511] * 16 + row.tolist()
    for n in 2, 4:
        gram = lambda i: tuple(before[17 + i - n : 17 + i])
        places = [max((j for j in range(i) if gram(j) == gram(i)), default=None) for i in range(64)]
        expected = [511 if j is None else int(row[j + 1]) for j in places]
        code = torch.tensor([[hash(gram(i)) for i in range(64)]])
        assert last_follower(code[..., None], row[None])[0, :, 0].tolist() == expected
        assert 5 < sum(j is not None for j in places) < 64


@torch.no_grad()
def test_ngrams_reach_back_to_the_beginning_of_the_patch():
    """Without matches the context of a byte is its last 5 symbols and its patch so far, and nothing before."""
    model = random_model(n_ngram=4096)
    model.context.match_up.weight.zero_()
    context = lambda text: model.context(torch.tensor([[b + 256 * (b == 32) for b in text]]), model.wte)[0][0, -1]
    assert torch.equal(context(b"one abcdefgh"), context(b"two abcdefgh"))
    assert not torch.equal(context(b"one abcdefgh"), context(b"one bbcdefgh"))
    assert torch.equal(context(b"on abcdefghijklmnopqr"), context(b"on bbcdefghijklmnopqr"))  # 16 symbols at most
    assert not torch.equal(context(b"one abc"), context(b"two abc"))
    assert torch.equal(context(b"one abcd"), context(b"ane abcd"))


@torch.no_grad()
def test_a_symbol_is_scored_with_the_row_it_will_receive():
    """The logit of a likely symbol counts the very row of the table that it gets as input when it comes."""
    model, row, looked_up = random_model(n_ngram=100_003, n_decoder=0), symbols(40, rate=0.3), []
    rows = model.context.rows
    model.context.rows = lambda codes: looked_up.append(codes[0]) or rows(codes)
    z, open_patch, _ = model.encode(row[None])
    received = looked_up.pop()[:, -1]  # (40,) the hash of the patch so far at each byte
    z = model.wte(row.roll(-1))[None]  # as if sure of the next symbol
    logits = model.decode(z, open_patch)[0]
    scored = looked_up.pop()  # (40, 8)
    model.decoder.query.weight.zero_()
    plain = model.decode(z, open_patch)[0]
    likeliest = plain.topk(LIKELIEST).indices
    expected = (likeliest[:-1] == row[1:, None]).nonzero()  # (byte, place among its likeliest)
    assert len(expected) > 30 and all(scored[i, j] == received[i + 1] for i, j in expected)
    assert torch.equal(logits != plain, torch.zeros(40, 512, dtype=torch.bool).scatter(1, likeliest, True))


def greedy_uncached(model, prompt, n):
    window, out = prompt, []
    for _ in range(n):
        window = model.fit(window)
        out.append(model(window[None])[0][0, -1].argmax())
        window = torch.cat([window, out[-1][None]])
    return torch.stack(out)


def test_a_window_shows_its_chunk_and_the_one_before():
    q, k, v = torch.randn(3, 2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(50)[:, None], torch.arange(50)
    for window in 1, 7, 24, 25, 26, 0:
        seen = (j <= i) & (j // window >= i // window - 1) if window else j <= i
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        assert torch.allclose(attend(q, k, v, window), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [STLM, GPT])
def test_longer_rows_than_trained_on(kind):
    """What a row begins with is predicted as before, and its end sees what a short row would not reach."""
    model = random_model(window=3)
    if kind is GPT:
        model = GPT(STLMConfig(block_size=64, n_layer=2, n_head=2, n_embd=32, window=3), vocab_size=512)
    text = symbols(200, rate=0.2)
    short = model(text[None, :64])[0]
    model.set_block_size(200)
    assert model.config.block_size == 200
    long = model(text[None])[0]
    assert torch.allclose(long[:, :64], short, atol=1e-5)
    ids = next(model.stream([text], 1, temperature=0))  # the whole of it fits
    assert len(model.fit(text)) == 200 and ids.item() == long[0, -1].argmax().item()


def test_matches_of_the_patch_and_of_two(monkeypatch):
    """Where the last two patches occurred before, only what followed both there is found, not what followed the last one."""
    word = lambda text: list(text[:-1]) + [text[-1] + 256]
    text = torch.tensor(word(b"one ") + word(b"two ") + [ord("x") + 256] + word(b"six ") + word(b"two ") + [ord("y") + 256]
                        + word(b"one ") + word(b"two "))
    found, model = [], random_model()
    monkeypatch.setattr("model.last_follower", lambda codes, x: found.append(last_follower(codes, x)) or found[0])
    model.context(text[None], model.wte)
    of_4, of_patch, of_two = found[0][0, -1].tolist()
    assert of_two == ord("x") + 256 and of_patch == of_4 == ord("y") + 256


@torch.no_grad()
def test_cached_generation_equals_uncached():
    """A batch of prompts of unequal length, far past block_size and max_patches."""
    for sizes in (dict(max_patches=8), dict(max_patches=64), dict(n_encoder=2), dict(attend_twice=True),
                  dict(max_patches=64, window=3)):
        model = random_model(**sizes)
        prompts = [symbols(n, seed=n) for n in (1, 5, 17, 40, 64, 200)]
        out = model.generate(prompts, 150, temperature=0)
        for prompt, row in zip(prompts, out):
            assert torch.equal(row, greedy_uncached(model, prompt, 150))


@torch.no_grad()
def test_cached_generation_of_the_rival():
    torch.manual_seed(0)
    model = GPT(STLMConfig(block_size=24, n_layer=2, n_head=2, n_embd=32, attend_twice=True, window=5), 300)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts = [symbols(n, rate=0, seed=n) for n in (1, 5, 24, 60)]
    out = model.generate(prompts, 60, temperature=0)
    for prompt, row in zip(prompts, out):
        assert torch.equal(row, greedy_uncached(model, prompt, 60))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_writes_what_the_cpu_writes(compiled):
    """Its recorded steps, of rows that close their patches at different times, with prompts read anew in between. In double
    precision: in no other are the likeliest two always further apart than rounding."""
    rival = GPT(STLMConfig(block_size=24, n_layer=1, n_head=2, n_embd=32, window=5), 300)
    for model in random_model(seed=1, max_patches=8), random_model(n_layer=1, attend_twice=True, window=3), rival:
        model.double()
        prompts = [symbols(n, rate=0, seed=n) for n in (9, 5, 20)]
        expected = model.generate(prompts, 150, temperature=0)
        model.cuda()
        if compiled:
            model.compile_steps()
        for rows in 3, 1:
            written = model.generate([p.cuda() for p in prompts[:rows]], 150, temperature=0)
            assert rows == 1 or torch.equal(written.cpu(), expected)
        assert torch.equal(written[0].cpu(), model.cpu().generate(prompts[:1], 150, temperature=0)[0])


@pytest.mark.slow
def test_compiled_steps_write_the_same():
    """Of one row and of several, which close their patches at different times; with prompts read anew in between."""
    if why_no_compile("cpu"):
        pytest.skip("torch.compile does not work here")
    rival = GPT(STLMConfig(block_size=24, n_layer=1, n_head=2, n_embd=32, window=5), 300)
    for model, rows in (random_model(n_layer=1, attend_twice=True, window=3), 1), (random_model(n_layer=1), 3), (rival, 2):
        prompts = [symbols(n, rate=0, seed=n) for n in (9, 5, 20)[:rows]]
        expected, logits = model.generate(prompts, 70, temperature=0), model(prompts[0][None])[0]
        model.compile_steps()
        assert torch.equal(model(prompts[0][None])[0], logits)  # as it was: not compiled
        assert torch.equal(model.generate(prompts, 70, temperature=0), expected)


@pytest.mark.slow
def test_the_likeliest_symbols_compiled():
    """Those of topk(), also below zero and where all are near to one another; and never an index out of range."""
    if why_no_compile("cpu"):
        pytest.skip("torch.compile does not work here")
    compiled = torch.compile(likeliest, dynamic=False)
    for step, shift in (0.005, 0.0), (0.005, -100.0), (0.2, -50.0):  # more than 1 / 256 apart
        logits = torch.stack([step * torch.randperm(512) + shift for _ in range(20)])
        for precision in torch.float32, torch.bfloat16:
            best = logits.to(precision).gather(-1, compiled(logits.to(precision)))
            assert torch.equal(best, logits.to(precision).topk(LIKELIEST).values)
    for broken in torch.nan, torch.inf, -torch.inf, 1e30:
        found = compiled(logits.where(logits < 0, broken))
        assert found.min() >= 0 and found.max() < 512


def test_sampling_options():
    model, prompt = random_model(), [symbols(9)]
    make = lambda **options: model.generate(prompt, 40, generator=torch.Generator().manual_seed(1), **options)[0].tolist()
    assert make() == make() and make() != make(temperature=2.0)
    assert make(top_k=1) == make(temperature=0) == make(top_p=1e-6)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(2000, 1)
    assert set(pick(logits, top_k=2).tolist()) == {1, 2}
    assert set(pick(logits, top_p=0.7).tolist()) == {1, 2}  # 0.64 alone is too little
    share = (pick(logits, generator=torch.Generator().manual_seed(0)) == 1).float().mean().item()
    assert share == pytest.approx(logits[0].softmax(0)[1].item(), abs=0.05)


def test_golden_greedy_output():
    """A tiny seeded model writes what it wrote when this test was made: any change of the architecture shows here."""
    out = random_model(seed=42).generate([torch.tensor([511])], 24, temperature=0)[0]
    assert out.tolist() == GOLDEN


GOLDEN = [493, 189, 330, 467, 305, 127, 127, 280, 52, 381, 347, 406, 493, 127, 193,
          262, 504, 417, 64, 195, 297, 91, 493, 193]


def test_tied_table_and_sizes():
    """One byte table serves input and output, and the shipped sizes are what their names say."""
    model = random_model()
    assert [name for name, p in model.named_parameters() if 512 in p.shape] == ["wte.weight"]
    for name, millions in (("stlm_10m", 10), ("stlm_50m", 50), ("stlm_100m", 100)):
        values = runpy.run_path(str(ROOT / "config" / f"{name}.py"))
        with torch.device("meta"):
            model = STLM(STLMConfig(**{f.name: values[f.name] for f in fields(STLMConfig) if f.name in values}))
        total = sum(p.numel() for p in model.parameters())
        assert abs(total / 1e6 / millions - 1) < 0.05
        assert model.wte.weight.numel() < 0.01 * 50257 * values["n_embd"]  # 99% fewer than GPT-2's table


def test_every_parameter_learns():
    """After a few steps from initialisation gradients reach every parameter."""
    torch.manual_seed(0)
    model = STLM(STLMConfig(block_size=64, max_patches=16, n_layer=2, n_head=2, n_embd=32, d_byte=16, n_ngram=160))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.stack([symbols(65, seed=i) for i in range(4)])
    for _ in range(4):
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
