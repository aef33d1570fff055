"""The model's promises: exactly causal, exact likelihoods, exact pooling, exact caches."""
import re
import runpy
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, prose, random_model, symbols

from model import GPT, STLM, STLMConfig, attend, last_follower, pick
from prepare import encode


# --- what depends on what -------------------------------------------------------------------------
def changed_before(outputs, a, b, j):
    """The largest change of outputs(symbols) before position j when symbols a turn into b, which
    differ from j on."""
    assert (a[:j] == b[:j]).all() and a[j] != b[j]
    with torch.no_grad():
        change = (outputs(a) - outputs(b)).abs()
    assert change[j:].max() > 1e-3  # the edit is seen at all
    return change[:j].max().item()


@pytest.mark.parametrize("patcher", ["words", "gpt2", "fixed:1", "fixed:4"])
def test_causal_for_every_patcher(patcher, request):
    if patcher == "gpt2":
        request.getfixturevalue("gpt2")
    model = random_model()
    text = torch.from_numpy(encode(prose(64), patcher).astype("int64"))[:64]
    for j in range(1, 64, 3):
        # other bytes and boundaries, then only other boundaries, then only other bytes
        for new in (symbols(64, seed=j), text ^ 256, text + 1 - 2 * (text % 2)):
            edited = torch.cat([text[:j], new[j:]])
            if edited[j] != text[j]:
                assert changed_before(lambda x: model(x[None])[0], text, edited, j) < 1e-5


@pytest.mark.parametrize("max_patches", [1, 3, 16])
def test_causal_past_max_patches(max_patches):
    model = random_model(max_patches=max_patches)
    a, y = symbols(64, rate=0.5), symbols(64, seed=1)
    losses = lambda x: model(x[None], y[None], reduction="none")
    for j in range(1, 64, 5):
        assert changed_before(losses, a, torch.cat([a[:j], a[j:] ^ 257]), j) < 1e-5


@pytest.mark.parametrize("window", [0, 3])
def test_likelihood_is_the_chain_rule(window):
    """The loss of each symbol equals -log p(symbol | the prefix alone), and their sum is the loss
    of the text."""
    model, text = random_model(window=window, max_patches=64), symbols(60)
    x, y = text[:-1], text[1:]
    with torch.no_grad():
        losses = model(x[None], y[None], reduction="none")
        for i in range(len(x)):
            logits = model(x[None, : i + 1])[0, -1]
            assert torch.allclose(losses[i], -logits.log_softmax(-1)[y[i]], atol=1e-4)
            assert logits.shape == (512,)  # over all symbols: a true distribution
        total = model(x[None], y[None], reduction="sum").item()
        assert losses.sum().item() == pytest.approx(total, rel=1e-5)
        assert losses.mean().item() == pytest.approx(model(x[None], y[None]).item(), rel=1e-5)
        y = y.where(torch.arange(59) < 20, -100)  # -100 is left out
        mean = model(x[None], y[None]).item()
        assert losses[:20].mean().item() == pytest.approx(mean, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("max_patches", [4, 16, 64])
def test_pooling_against_a_slow_loop(max_patches):
    """The whole forward pass, with pooling and unpooling spelled out byte by byte: for logits with
    every patch, for the loss with at most max_patches."""
    model = random_model(max_patches=max_patches)
    x = torch.stack([symbols(64, rate, seed=7) for rate in (0.0, 0.1, 0.5, 1.0)])
    y = x.roll(-1, dims=1)
    for fast, room in ((model(x), 64), (model(x, y, reduction="none").view(4, 64), max_patches)):
        for i, sequence in enumerate(x):
            z, open_patch = model.embed(sequence[None])
            z = model.encoder(z)[0]
            means, begin = [], 0
            for j, symbol in enumerate(sequence.tolist()):
                if symbol >= 256 and len(means) < room:
                    means.append(z[begin : j + 1].mean(0))
                    begin = j + 1
            if means:
                h = model.transform(torch.stack(means)[None], model.rope[:, : len(means)])[0]
            received, n_closed = [], 0
            for symbol in sequence.tolist():
                n_closed = min(n_closed + (symbol >= 256), room)
                received.append(h[n_closed - 1] if n_closed else model.start)
            slow = model.decode(z + torch.stack(received), open_patch[0])
            if fast.ndim == 2:
                slow = torch.nn.functional.cross_entropy(slow, y[i], reduction="none")
            assert torch.allclose(slow, fast[i], atol=1e-4)


def test_overflow_keeps_the_last_patch():
    """Where training has no room for a patch, what comes before it is predicted as with room."""
    sequence, y = symbols(64, rate=0.5), symbols(64, seed=1)
    tight, roomy = random_model(max_patches=4), random_model(max_patches=64)  # the same weights
    fifth = (sequence >= 256).nonzero()[4].item()
    with torch.no_grad():
        tight, roomy = (m(sequence[None], y[None], reduction="none") for m in (tight, roomy))
    assert torch.allclose(tight[:fifth], roomy[:fifth], atol=1e-4)
    assert (tight[fifth:] - roomy[fifth:]).abs().max() > 1e-3


def test_a_window_shows_its_chunk_and_the_one_before():
    q, k, v = torch.randn(3, 2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    i, j = torch.arange(50)[:, None], torch.arange(50)
    for window in 1, 7, 24, 25, 26, 0:
        seen = (j <= i) & (j // window >= i // window - 1) if window else j <= i
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        assert torch.allclose(attend(q, k, v, window), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [STLM, GPT])
def test_longer_sequences_than_trained_on(kind):
    """What a sequence begins with is predicted as before, and its end sees what a short one would
    not reach."""
    model = random_model(kind=kind, window=3, vocab_size=512)
    text = symbols(200, rate=0.2)
    short = model(text[None, :64])
    model.set_block_size(200)
    assert model.config.block_size == 200 and model.config.max_patches == 50
    long = model(text[None])
    assert torch.allclose(long[:, :64], short, atol=1e-5)
    new = model.generate(text[None], 1, temperature=0)  # the whole of it fits
    assert new.item() == long[0, -1].argmax().item()
    assert not torch.allclose(model(text[None, -64:])[0, -1], long[0, -1], atol=1e-3)


# --- what is looked up ----------------------------------------------------------------------------
@torch.no_grad()
def test_what_followed_before():
    """The symbol after the last earlier position with the same last n symbols, against a search by
    hand."""
    text = torch.randint(97, 99, (64,), generator=torch.Generator().manual_seed(0))
    before = [511] * 16 + text.tolist()
    for n in 2, 4:
        gram = lambda i: tuple(before[17 + i - n : 17 + i])
        found = [max((j for j in range(i) if gram(j) == gram(i)), default=None) for i in range(64)]
        expected = [511 if j is None else int(text[j + 1]) for j in found]
        keys = torch.tensor([hash(gram(i)) for i in range(64)])[None, :, None]
        assert last_follower(keys, text[None])[0, :, 0].tolist() == expected
        assert 5 < sum(j is not None for j in found) < 64


@torch.no_grad()
def test_matches_of_the_patch_and_of_two(monkeypatch):
    """Where the last two patches occurred before, only what followed both there is found, not what
    followed the last one."""
    word = lambda text: [*text[:-1], text[-1] + 256]
    text = torch.tensor([
        *word(b"one "), *word(b"two "), *word(b"x"), *word(b"six "), *word(b"two "), *word(b"y"),
        *word(b"one "), *word(b"two ")])
    found, model = [], random_model()

    def noted(keys, x):
        found.append(last_follower(keys, x))
        return found[-1]

    monkeypatch.setattr("model.last_follower", noted)
    model.embed(text[None])
    of_4, of_patch, of_two = found[0][0, -1].tolist()
    assert of_two == ord("x") + 256 and of_patch == of_4 == ord("y") + 256


@torch.no_grad()
def test_ngrams_reach_back_to_the_beginning_of_the_patch():
    """Without matches a byte knows the last 5 symbols and its patch so far, and nothing before."""
    model = random_model(n_ngram=4096)
    model.embed.match.weight.zero_()

    def embedding(text):
        return model.embed(torch.tensor([[b + 256 * (b == 32) for b in text]]))[0][0, -1]

    same = lambda a, b: torch.equal(embedding(a), embedding(b))
    assert same(b"one abcdefgh", b"two abcdefgh")
    assert not same(b"one abcdefgh", b"one bbcdefgh")
    assert same(b"on abcdefghijklmnopqr", b"on bbcdefghijklmnopqr")  # 16 symbols at most
    assert not same(b"one abc", b"two abc")
    assert same(b"one abcd", b"ane abcd")


@torch.no_grad()
def test_a_symbol_is_scored_with_the_row_it_will_receive():
    """The logit of the likeliest symbol of each group of 16 counts the very row of the table that
    the symbol gets as input when it comes; no other logit does."""
    model, text, looked_up = random_model(n_ngram=100_003, n_decoder=0), symbols(40, rate=0.3), []
    rows = model.embed.ngram_rows
    model.embed.ngram_rows = lambda hashes: looked_up.append(hashes) or rows(hashes)
    _, open_patch = model.embed(text[None])
    received = looked_up.pop()[0, :, -1]  # (40,) the hash of the patch so far at each byte
    z = model.embed.byte(text.roll(-1))  # as if sure of the next symbol
    logits = model.decode(z, open_patch[0])
    scored = looked_up.pop()  # (40, 16)
    model.ngram_query.weight.zero_()
    plain = model.decode(z, open_patch[0])

    groups = torch.stack([plain[:, group::16] for group in range(16)], dim=1)  # (40, 16, 32)
    likeliest = 16 * groups.argmax(-1) + torch.arange(16)
    expected = (likeliest[:-1] == text[1:, None]).nonzero()  # (byte, group)
    assert len(expected) > 30 and all(scored[i, j] == received[i + 1] for i, j in expected)
    counted = torch.zeros(40, 512, dtype=torch.bool).scatter(1, likeliest, True)
    assert torch.equal(logits != plain, counted)


# --- generation -----------------------------------------------------------------------------------
def generate_without_cache(model, ids, max_new):
    """What generate(temperature=0) promises, reading the whole text anew each time: (B, max_new).

    A sequence that reaches block_size goes on from its last half.
    """
    block_size, n_prompt = model.config.block_size, ids.size(1)
    n = min(n_prompt, block_size)
    for _ in range(max_new):
        new = model(ids[:, -n:])[:, -1].argmax(-1)
        ids = torch.cat([ids, new[:, None]], dim=1)
        n = n + 1 if n < block_size else max(1, block_size // 2)
    return ids[:, n_prompt:]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"window": 3, "attend_twice": True}, {"n_encoder": 2, "n_layer": 1},
                                   {"max_patches": 1}, {"block_size": 3}, {"block_size": 1}])
def test_cached_generation_equals_uncached(sizes):
    """Batches that close their patches at different times, far past block_size."""
    model = random_model(**sizes)
    for n in 1, 17, 64, 200:
        rates = enumerate((0.25, 0.5, 0, 1))
        prompts = torch.stack([symbols(n, rate, seed=i) for i, rate in rates])
        expected = generate_without_cache(model, prompts, 100)
        assert torch.equal(model.generate(prompts, 100, temperature=0), expected)


@torch.no_grad()
def test_cached_generation_of_the_baseline():
    for window in 0, 5:
        model = random_model(kind=GPT, block_size=24, window=window, vocab_size=300)
        for n in 1, 5, 24, 60:
            prompts = torch.stack([symbols(n, rate=0, seed=i) for i in range(3)])
            expected = generate_without_cache(model, prompts, 60)
            assert torch.equal(model.generate(prompts, 60, temperature=0), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_writes_what_the_cpu_writes():
    """Sequences that close their patches at different times, past block_size. In double precision:
    in no other are the likeliest two always further apart than rounding."""
    baseline = random_model(kind=GPT, block_size=24, window=5, vocab_size=300)
    for model in random_model(seed=1), random_model(n_layer=1, window=3), baseline:
        model.double()
        prompts = torch.stack([symbols(9, rate=0, seed=i) for i in range(3)])
        expected = model.generate(prompts, 150, temperature=0)
        written = model.cuda().generate(prompts.cuda(), 150, temperature=0)
        assert torch.equal(written.cpu(), expected)


def test_sampling_options():
    model, prompt = random_model(), symbols(9)[None]

    def make(**options):
        generator = torch.Generator().manual_seed(1)
        return model.generate(prompt, 40, generator=generator, **options)[0].tolist()

    assert make() == make() and make() != make(temperature=2.0)
    assert make(top_k=1) == make(temperature=0) == make(top_p=1e-6)
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(2000, 1)
    assert set(pick(logits, top_k=2).tolist()) == {1, 2}
    assert set(pick(logits, top_k=9).tolist()) == {0, 1, 2, 3}
    assert set(pick(logits, top_p=0.7).tolist()) == {1, 2}  # 0.64 alone is too little
    chosen = pick(logits, generator=torch.Generator().manual_seed(0))
    share = (chosen == 1).float().mean().item()
    assert share == pytest.approx(logits[0].softmax(0)[1].item(), abs=0.05)


def test_golden_greedy_output():
    """A tiny seeded model writes what it wrote when this test was made: any change of the
    architecture shows here."""
    out = random_model(seed=42).generate(torch.tensor([[511]]), 24, temperature=0)[0]
    assert out.tolist() == GOLDEN


GOLDEN = [295, 36, 295, 144, 148, 210, 137, 250, 144, 148, 49, 137,
          128, 432, 144, 148, 137, 60, 137, 144, 144, 503, 274, 274]


# --- parameters -----------------------------------------------------------------------------------
def test_tied_table():
    """One byte table serves input and output."""
    tables = [name for name, p in random_model().named_parameters() if 512 in p.shape]
    assert tables == ["embed.byte.weight"]


def test_shipped_sizes_are_what_their_names_say():
    vocab_size = {"bytes": 512, "gpt2": 50257}
    sized = [path for path in (ROOT / "config").glob("*.py") if re.search(r"_\d+m$", path.stem)]
    assert len(sized) >= 6
    for path in sized:
        values = runpy.run_path(str(path))
        sizes = {f.name: values[f.name] for f in fields(STLMConfig) if f.name in values}
        tokenizer = values.get("tokenizer", "bytes")
        n_vocab = vocab_size.get(tokenizer) or int(tokenizer.removeprefix("bpe:"))
        kind = GPT if values.get("model") == "gpt" else STLM
        with torch.device("meta"):
            model = kind(STLMConfig(**sizes | {"vocab_size": n_vocab}))
        millions = int(path.stem.split("_")[-1][:-1])
        n_parameters = sum(p.numel() for p in model.parameters())
        assert abs(n_parameters / 1e6 / millions - 1) < 0.07, (path.stem, n_parameters)
        if kind is STLM:  # 99% fewer than GPT-2's table
            assert model.embed.byte.weight.numel() < 0.01 * 50257 * values["n_embd"]


@pytest.mark.parametrize("kind", [STLM, GPT])
def test_every_parameter_learns(kind):
    """After a few steps from initialisation gradients reach every parameter."""
    torch.manual_seed(0)
    model = kind(STLMConfig(block_size=64, max_patches=16, n_layer=2, n_head=2, n_embd=32,
                            d_byte=16, n_ngram=160))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text = torch.stack([symbols(65, seed=i) for i in range(4)])
    for _ in range(4):
        optimizer.zero_grad()
        model(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
