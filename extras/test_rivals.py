"""Compares each rival with plain lists of tokens or pages, then tests their table.

The expected outputs come from the rivals' papers, by lists of positions, and share no code with
rivals.py.
"""

import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench
from extras import rivals
from model import rope_table
from retro_attention import OpsWrapper, apply_rope
from test_retro import (
    BENCH,
    DEVICE,
    by_position,
    check_output,
    pages_to_load,
    quest_bounds,
    random_model,
    random_qkv,
    random_tokens,
    refused_in_a_line,
    rotate,
    run_main,
)

ONE_PAGE = replace(BENCH, min_tokens=1, budget=0.01)
PLACES = list(np.ndindex(2, 2))  # (text, KV head) of the layers tested here


# --------------------------------------------------------------------------------------------------
# One layer of a rival


def tokens_allowed(t, retro=BENCH):
    return pages_to_load(retro, t)[0] * 8


def run_rival(name, prompt_len=45, T=110, retro=BENCH):
    """Decodes T random tokens with one layer. Returns q, k and v (B, T, heads, hs) before rotation,
    and t -> output (B, n_head, hs).

    The layer has decoded another text before, so any state left over would show.
    """
    model = random_model()
    layer = rivals.RIVALS[name][0](model, 2, retro, 128).layers[0]
    cos, sin = rope_table(model.config, 128, "cpu", torch.float64)

    def run(q, k, v, prompt_len, T):
        layer.cache.k.fill_(math.nan)
        layer.cache.v.fill_(math.nan)
        prompt = [apply_rope(x[:, :prompt_len], cos[:prompt_len], sin[:prompt_len]) for x in (q, k)]
        layer.prefill(*prompt, v[:, :prompt_len])
        outputs = {}
        for t in range(prompt_len, T):
            row = [x[:, t : t + 1] for x in (q, k, v)]
            outputs[t] = layer.decode(*row, cos, sin, torch.tensor(t))[:, 0]
        return outputs

    run(*random_qkv(T=120, seed=1), 100, 120)
    q, k, v = random_qkv(T=T)
    return q, k, v, run(q, k, v, prompt_len, T)


def rotated(x):
    """x (B, T, heads, hs), rotated in numpy, each row at its own position."""
    turned = rotate(x.numpy(), np.arange(x.shape[1]), random_model().config)
    return torch.from_numpy(turned)


def weights_over(q, k, keys):
    """Softmax weights (n_head, keys) of the query heads q (n_head, hs) over the positions `keys` of
    k (T, n_kv_head, hs)."""
    heads = [k.numpy()[keys, h // 3] @ q[h].numpy() for h in range(len(q))]
    logits = np.stack(heads) / math.sqrt(q.shape[1])
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def check_kept(o, q, k, v, t, kept):
    """Checks that o is attention of the query at t over the positions kept[text, KV head]."""
    check_output(o, q, k, v, t, lambda b, h: kept[b, h])


def test_streaming_llm_keeps_sinks_and_recent_tokens_and_renumbers_them():
    """A list holds the tokens. If it is too long, it drops the oldest after the first four. Keys
    are rotated by their place in the list.

    Guards against sinks at their old distance, and against tokens that come back when the budget
    grows.
    """
    q, k, v, outputs = run_rival("StreamingLLM")
    config = random_model().config
    held = list(range(45))
    grown = 0
    for t, o in outputs.items():
        held.append(t)
        while len(held) > tokens_allowed(t):
            del held[4]
        grown += len(held) < tokens_allowed(t)
        places = np.arange(len(held))
        keys = torch.from_numpy(rotate(k[:, held].numpy(), places, config))
        query = torch.from_numpy(rotate(q[:, [t]].numpy(), places[-1:], config))
        check_kept(o, query, keys, v[:, held], 0, dict.fromkeys(PLACES, places))
    assert grown > 3, "the budget has never grown: the test is weaker than it should be"


def test_tova_evicts_the_least_attended_token_of_the_layer():
    """One list per text. After a step, the tokens with the lowest weights of its query, averaged
    over all heads, make room for the next. Guards against one list per KV head."""
    q, k, v, outputs = run_rival("TOVA")
    q = rotated(q)
    k = rotated(k)
    kept = [list(range(45)), list(range(45))]

    def evict(t):
        for b in range(2):
            mean = weights_over(q[b, t], k[b], kept[b]).mean(0)
            while len(kept[b]) > tokens_allowed(t + 1) - 1:
                lowest = int(mean.argmin())
                mean = np.delete(mean, lowest)
                del kept[b][lowest]

    evict(44)
    for t, o in outputs.items():
        for b in range(2):
            kept[b].append(t)
            assert len(kept[b]) <= tokens_allowed(t)
        check_kept(o, q, k, v, t, {(b, h): kept[b] for b, h in PLACES})
        evict(t)
    assert kept[0] != kept[1] and kept[0] != list(range(110 - len(kept[0]), 110))


@pytest.mark.parametrize("retro, n", [(BENCH, 6), (ONE_PAGE, 10)], ids=["", "one page"])
def test_morphkv_keeps_the_newest_tokens_and_those_that_their_queries_attend_to(
    monkeypatch, retro, n
):
    """One list per KV head. After a step, tokens make room for the next: of those before the
    last n, the lowest by sum of weights over these n queries and the query heads; else the oldest.

    Guards against queries of the prompt that are left out, a window off by one, and tokens that
    come back when the budget grows.
    """
    monkeypatch.setattr(rivals, "RECENT", n)
    q, k, v, outputs = run_rival("MorphKV", retro=retro)
    q = rotated(q)
    k = rotated(k)
    kept = {place: list(range(45)) for place in PLACES}
    given = {place: [] for place in PLACES}  # for each query, position -> weight

    def learn(t, b, h, keys):
        weights = weights_over(q[b, t], k[b], keys)[h * 3 : h * 3 + 3].sum(0)
        given[b, h].append(dict(zip(keys, weights.tolist(), strict=True)))

    def evict(t, b, h):
        while len(kept[b, h]) > tokens_allowed(t + 1, retro) - 1:
            sums = [
                (sum(w.get(j, 0) for w in given[b, h][-n:]), j) for j in kept[b, h] if j <= t - n
            ]
            kept[b, h].remove(min(sums)[1] if sums else kept[b, h][0])

    for b, h in PLACES:
        for t in range(45):
            learn(t, b, h, list(range(t + 1)))
        evict(44, b, h)
    for t, o in outputs.items():
        for keys in kept.values():
            keys.append(t)
        check_kept(o, q, k, v, t, kept)
        for b, h in PLACES:
            learn(t, b, h, kept[b, h])
            evict(t, b, h)
    newest = list(range(110 - len(kept[0, 0]), 110))
    assert (kept[0, 0] == newest) == (retro is ONE_PAGE)
    assert (kept[0, 0] == kept[0, 1]) == (retro is ONE_PAGE)


@pytest.mark.parametrize("retro", [BENCH, ONE_PAGE], ids=["", "one page"])
def test_refreshkv_alternates_all_tokens_and_the_best_of_the_last_refresh(monkeypatch, retro):
    """Every 10th step reads all tokens. The steps in between read the tokens since then (if too
    many, the newest) and, in the room that is left, the best of that step. Guards against a refresh
    at the wrong step."""
    monkeypatch.setattr(rivals, "REFRESH", 10)
    q, k, v, outputs = run_rival("RefreshKV", retro=retro)
    q = rotated(q)
    k = rotated(k)
    kept = {}
    ranked = {}
    last = 44
    for t, o in outputs.items():
        if t == 45 or (t - 45) % 10 == 0:  # after the prompt, and after the full steps 54, 64, ...
            last = t - 1
            for b, h in PLACES:
                weights = weights_over(q[b, last], k[b], list(range(last + 1)))
                ranked[b, h] = np.argsort(-weights[h * 3 : h * 3 + 3].mean(0)).tolist()
        allowed = tokens_allowed(t, retro)
        for place, best in ranked.items():
            kept[place] = [*best[: max(0, allowed - (t - last))], *range(last + 1, t + 1)][
                -allowed:
            ]
            if (t - 44) % 10 == 0:
                kept[place] = range(t + 1)
        check_kept(o, q, k, v, t, kept)


@pytest.mark.parametrize("retro", [BENCH, ONE_PAGE], ids=["", "one page"])
def test_selection_reuse_chooses_at_every_second_step(retro):
    """The steps in between load the pages of the step before. A page begun since then comes first,
    and the old order holds for the rest, also if there is room for one page only."""
    q, k, v, outputs = run_rival("selection reuse", retro=retro)
    q = rotated(q)
    k = rotated(k)
    kept = {}
    ranked = {}
    for t, o in outputs.items():
        count, held, window = pages_to_load(retro, t)
        for b, h in PLACES:
            if (t - 45) % 2 == 0:
                bounds = quest_bounds(q[b, t, h * 3 : h * 3 + 3], k[b, :, h], t)
                order = [(page not in window, -bounds[page], page) for page in range(held)]
                ranked[b, h] = [page for _, _, page in sorted(order)]
            elif held - 1 not in ranked[b, h]:
                ranked[b, h].insert(0, held - 1)
            kept[b, h] = [j for j in range(t + 1) if j // 8 in ranked[b, h][:count]]
        check_kept(o, q, k, v, t, kept)


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_resa_repairs_the_cache(monkeypatch, dense_layers):
    """After a dense pass, keys, values and bounds are those of dense decoding; before the first
    pass, all is as with Quest.

    Guards against a pass one row short, bounds left as they were, a repair that reads the cached
    sparse outputs, and passes counted from an earlier text.
    """
    monkeypatch.setattr(rivals, "REFRESH", 8)
    model = random_model()
    tokens = random_tokens(2, 66)
    quest = replace(BENCH, dense_layers=dense_layers)
    resa = rivals.ReSA(model, 2, quest, 66)
    resa.prefill(tokens[:, :60])
    resa.step(tokens[:, 60])
    decoders = [resa, bench.counting(model, 2, quest, 66), bench.counting(model, 2, None, 66)]
    for decoder in decoders:
        decoder.prefill(tokens[:, :41])
    for t in range(41, 66):
        ours, quests, _ = [decoder.step(tokens[:, t]) for decoder in decoders]
        if t < 41 + 8:
            assert torch.equal(ours, quests)
        found, _, wanted = [all_keys_and_values(decoder)[..., : t + 1, :] for decoder in decoders]
        repaired = t % 8 == 0  # 48, 56, ...: eight steps each
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10) == repaired
        for layer in resa.layers[dense_layers:] if repaired else ():
            keys = by_position(layer.cache)[0][:, :, t // 8 * 8 : t + 1]
            assert torch.equal(layer.cache.bounds[:, :, t // 8, 1], keys.amax(2))


def all_keys_and_values(decoder):
    """(2 * layers, B, n_kv_head, positions, hs)."""
    return torch.stack([x for layer in decoder.layers for x in by_position(layer.cache)])


# --------------------------------------------------------------------------------------------------
# Ablations


def method(name, retro=BENCH, windows=(4,)):
    """A method of the table by its name."""
    found = bench.methods(retro, windows, True)
    return (found | rivals.methods(retro, windows, rivals.RIVALS, rivals.ABLATIONS))[name]


def logits_of(name, tokens, model, prompt_len=30, **options):
    """Logits (B, L, vocab) by a method of the table, and its decoder. It has decoded another text
    before, so any state left over would show."""
    found = method(name, replace(BENCH, **options))
    decoder = found.make(model, len(tokens), found.retro, tokens.shape[1])
    decoder.prefill(tokens[:, 30:60])
    for i in range(60, 64):
        decoder.step(tokens[:, i])
    logits = [decoder.prefill(tokens[:, :prompt_len])]
    logits += [decoder.step(token) for token in tokens[:, prompt_len:].T]
    return torch.stack(logits, 1), decoder


class KeepPages(OpsWrapper):
    """Appends the position, the pages, the newest query and all keys of each step to `seen`."""

    def __init__(self, ops, seen):
        super().__init__(ops)
        self.seen = seen

    def attend(self, q, cache, pages, loaded_before, t):
        if pages is not None:
            self.seen.append((int(t), pages, q[:, -1].clone(), cache.k.flatten(2, 3).clone()))
        return self.ops.attend(q, cache, pages, loaded_before, t)


@pytest.mark.parametrize("name", ["Quest one choice", "W=4 one choice", "W=4"])
def test_one_choice_loads_the_same_pages_for_all_kv_heads(name):
    """Those with the highest sum of Quest's scores over all heads. Without the ablation, the KV
    heads of a text load different pages."""
    tokens = random_tokens(2, 70)
    seen = []
    found = method(name)
    decoder = found.make(random_model(), 2, found.retro, 70)
    bench.wrap(decoder, lambda ops: KeepPages(ops, seen))
    decoder.prefill(tokens[:, :40])
    for token in tokens[:, 40:].T:
        decoder.step(token)
    assert len(seen) == 3 * 30
    same = all(torch.equal(pages[:, 0], pages[:, 1]) for _, pages, _, _ in seen)
    assert same == ("one choice" in name)
    for (t, pages, q, k), b in itertools.product(seen if same else (), range(2)):
        count, held, window = pages_to_load(found.retro, t)
        by_head = [quest_bounds(q[b, h * 3 : h * 3 + 3], k[b, h], t) for h in range(2)]
        bounds = np.sum(by_head, axis=0)
        order = sorted(range(held), key=lambda j: (j not in window, -bounds[j]))
        assert pages[b, 0].tolist() == sorted(order[:count])


@pytest.mark.parametrize("n_layer, equal", [(2, True), (3, False)])
def test_first_query_matters_from_the_second_layer_on(n_layer, equal):
    """The first layer's input is never corrected, so a fresh query equals the first query.
    In the second it differs, which shows in the third. Guards against a window off by one."""
    tokens = random_tokens(2, 70)
    model = random_model(n_layer=n_layer)
    a, _ = logits_of("W=4 first query", tokens, model)
    b, _ = logits_of("W=4", tokens, model)
    assert ((a - b).abs().max() < 1e-9) == equal


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU: CUDA graphs are not tested here")
@pytest.mark.parametrize("name", list(rivals.ABLATIONS))
def test_ablations_through_the_kernels(name):
    """Also in a CUDA graph that a second text reuses. Guards against a state that moves to other
    memory, which a graph does not follow."""
    tokens = random_tokens(2, 90).cuda()
    model = random_model().float().cuda()
    expected, _ = logits_of(f"W=4 {name}", tokens, model, impl="torch")
    found, decoder = logits_of(f"W=4 {name}", tokens, model, impl="triton")
    assert decoder.graph is not None
    assert (found - expected).abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------
# The table


def test_kv_share_counts_bounds_and_dense_passes():
    """By hand: position 63 holds 8 pages of 8 tokens, a quarter is 2, and the bounds of all pages
    are as large as one page. Guards against dense passes that are free."""
    retro = replace(BENCH, budget=0.25)
    dense = replace(retro, dense_layers=1)

    def share(name, n, retro=retro):
        found = method(name, retro)
        return found.kv_share(found.retro, 4, range(64 - n, 64))

    assert share("Quest one choice", 1) == share("W=4 first query", 1) == 3 / 8
    assert share("StreamingLLM", 1) == share("TOVA", 1) == share("MorphKV", 1) == 2 / 8
    assert share("TOVA", 1, dense) == (1 + 3 * 2 / 8) / 4
    assert share("selection reuse", 2) == (3 + 2) / 16
    counts = [(max(2, -(-(t // 8 + 1) // 4)), t // 8 + 1) for t in range(32, 64)]  # loaded, held
    held = sum(h for _, h in counts)
    assert share("RefreshKV", 32) == (sum(s for s, _ in counts[:-1]) + 8) / held
    resa = (sum(s + h / 8 for s, h in counts) + 8) / held
    assert math.isclose(share("ReSA", 32), resa)
    assert math.isclose(share("ReSA", 32, dense), (3 * resa + 1 + 8 / held) / 4)


@pytest.fixture
def table(capsys, monkeypatch):
    """Runs the command with a random model: its text, and the JSON of its last line."""
    monkeypatch.setattr(rivals, "REFRESH", 8)
    monkeypatch.setattr(bench, "load_model", lambda args: (random_model(), SimpleNamespace(bos=0)))
    small = "--passages 2 --prefix 40 --length 10 --page_size 8 --min_tokens 16 --device cpu"
    ablations = ["--ablations", *rivals.ABLATIONS]

    def run(options):
        argv = [*small.split(), *options.split(), *ablations]
        code, out, error = run_main(rivals.main, argv, capsys)
        assert code == 0, error
        return out, json.loads(out.splitlines()[-1])

    return run


def test_the_table_has_all_methods_and_no_method_twice(table):
    """A window of 1 is Quest in every number, also with its first query. Guards against two names
    for one method, and against an exposure that was not counted."""
    out, record = table("--windows 1 4 --budget 0.2")
    rows = record["results"]["rows"]
    ours = ["full", "Quest", "W=1", "W=4", "Quest one choice", "W=1 one choice", "W=4 one choice"]
    ours += ["W=1 first query", "W=4 first query"]
    theirs = ["StreamingLLM", "TOVA", "MorphKV", "selection reuse", "RefreshKV", "ReSA"]
    assert list(rows) == [*ours, *theirs]
    assert rows["W=1"] == rows["W=1 first query"] == rows["Quest"]
    assert rows["W=1 one choice"] == rows["Quest one choice"]
    assert len({row["kl"]["mean"] for row in rows.values()}) == len(rows) - 3  # W=1 is Quest
    assert all(row["kl"]["mean"] > 0 for name, row in rows.items() if name != "full")
    exposures = {name: row["exposure"] for name, row in rows.items()}
    assert exposures["Quest one choice"] == 1 < exposures["W=4 first query"]
    assert {name for name, x in exposures.items() if x is None} == {"full", *rivals.RIVALS}
    assert len(re.findall(r"^TOVA +[\d.]+% +- +0\.\d+ ", out, re.M)) == 2  # KL and nats
    assert record["command"] == "rivals" and record["arguments"]["rivals"] == list(rivals.RIVALS)


def test_a_full_budget_is_full_attention_in_the_table(table):
    """If all tokens are allowed, every method is full attention, and bounds or a second pass add to
    the bytes."""
    _, record = table("--windows 4 --budget 1.0")
    rows = record["results"]["rows"]
    for name, row in rows.items():
        assert abs(row["kl"]["mean"]) < 1e-5 and abs(row["gap"]["mean"]) < 1e-5, name
    shares = {name: row["kv_share"] for name, row in rows.items()}
    assert shares["full"] == shares["TOVA"] == 1 < shares["Quest"] < shares["ReSA"]


def test_the_rows_are_chosen_on_the_command_line(capsys):
    """All rivals and no ablation by default; an unknown name is refused in one line."""
    args = rivals.parse_args([])
    assert (args.rivals, args.ablations) == (list(rivals.RIVALS), [])
    args = rivals.parse_args(["--rivals", "--ablations", "one choice", "--control"])
    assert (args.rivals, args.ablations, args.control) == ([], ["one choice"], True)
    for option in ("--rivals", "--ablations"):
        result = run_main(rivals.main, [option, "nonsense"], capsys)
        refused_in_a_line(result, f"extras.rivals: error: argument {option}: invalid choice")
