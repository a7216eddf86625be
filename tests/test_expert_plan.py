"""The plan for caches of experts and the profile of their number: by brute force, in all families, in the manifest."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from compressor import Recipe, compress, load
from compressor.dynamic_k import counts, default_of, going_to, profile
from compressor.errors import DataError, ModelError, RecipeError
from compressor.evaluate import measure, torch_runner
from compressor.expert_plan import cache_plan, held_out, pinned, simulated, used
from compressor.mixtures import mixtures
from compressor.model import as_loaded
from compressor.plan import plan_of
from compressor.progress import Silent

IDS = torch.randint(5, 288, (2, 20), generator=torch.Generator().manual_seed(1))
FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe",
)  # fmt: skip
E, K = 6, 2


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """K experts of E for every token, some far more often than others; expert 0 never."""
    noise = torch.rand(*shape, E, generator=torch.Generator().manual_seed(seed)) + torch.arange(E) * 0.15
    noise[..., 0] = -1
    return torch.zeros(*shape, E, dtype=torch.bool).scatter(-1, noise.topk(K).indices, True)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def test_counts_are_those_of_every_token():
    here, there = drawn(2, 7), drawn(2, 7, seed=1)
    use = used(here, there)
    assert use.next is not None
    a, b = here.flatten(0, 1), there.flatten(0, 1)
    for e in range(E):
        n = a[:, e].sum().item()
        assert use.freq[e] == pytest.approx((n + 1 / E) / (len(a) * K + 1))
        for f in range(E):
            both = sum(bool(x[e] and y[f]) for x, y in zip(a, b, strict=True))
            assert use.next[e, f] == pytest.approx((both + K / E) / (n + 1))
        pairs = [(w[t, e].item(), w[t + 1, e].item()) for w in here for t in range(6)]
        again = sum(x and y for x, y in pairs)
        assert use.stick[e] == pytest.approx((again + K / E) / (sum(x for x, _ in pairs) + 1))
    torch.testing.assert_close(use.next.sum(-1), torch.full((E,), float(K), dtype=torch.float64))
    assert use.freq.sum() == pytest.approx(1)


def test_caches_hold_what_a_list_of_them_holds():
    layers = [drawn(50, seed=s) for s in (2, 3)]
    freq = [layer.double().mean(0) for layer in layers]
    follow = torch.rand(E, E, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = simulated(layers, freq, [follow], K)
    assert found["capacity"] == [2, 3, 4, 6]
    for c, *rates in zip(found["capacity"], found["lru"], found["pinned"], found["prefetch"], strict=True):
        hits = [0, 0, 0]
        for number, layer in enumerate(layers):
            often = sorted(range(E), key=lambda e: -freq[number][e].item())
            recent = list(often)  # last used first
            for t, row in enumerate(layer):
                chosen = row.nonzero().flatten().tolist()
                ahead = often
                if number:
                    score = follow[layers[0][t]].sum(0)
                    ahead = sorted(range(E), key=lambda e: -score[e].item())
                for i, cache in enumerate((recent, often, ahead)):
                    hits[i] += len(set(cache[:c]) & set(chosen))
                recent = chosen + [e for e in recent if e not in chosen]
        assert rates == [round(h / (2 * 50 * K), 4) for h in hits]
    for policy in ("lru", "pinned", "prefetch"):
        assert found[policy] == sorted(found[policy]) and found[policy][-1] == 1


def test_what_always_follows_is_fetched_in_time():
    pairs = torch.randint(E // 2, (40,), generator=torch.Generator().manual_seed(6))
    first = torch.nn.functional.one_hot(pairs, E // 2).bool().repeat_interleave(2, 1)
    second = first.roll(2, dims=-1)
    after = used(first[None, :20], second[None, :20]).next
    assert after is not None
    found = simulated([first[20:], second[20:]], [torch.ones(E) / E] * 2, [after], K)
    alone = simulated([first[20:]], [torch.ones(E) / E], [], K)
    assert found["prefetch"][0] == pytest.approx((1 + alone["prefetch"][0]) / 2, abs=1e-4) and found["lru"][0] < 0.6


def test_pinned_are_those_that_save_most_for_their_bytes():
    freq = {"a": torch.tensor([0.5, 0.3, 0.2]), "b": torch.tensor([0.1, 0.6, 0.3])}
    sizes = {"a": [30, 10, 10], "b": [10, 20, 10]}  # 1/60, .03, .02; .01, .03, .03
    assert pinned(freq, sizes, 40) == {"a": [1], "b": [1, 2]}
    assert pinned(freq, sizes, 35) == {"a": [1], "b": [1]}  # then 5 bytes are left and fit nobody
    assert pinned(freq, sizes, 65) == {"a": [1, 2], "b": [0, 1, 2]}  # expert 0 of a does not fit, one behind it does
    assert pinned(freq, sizes, 0) == {"a": [], "b": []}


def test_a_plan_is_tried_on_text_that_it_has_not_seen():
    here = {"a": drawn(10, 8), "b": drawn(10, 8, seed=1)}
    other = {n: torch.cat((one[:-1], drawn(1, 8, seed=9))) for n, one in here.items()}
    sizes = {n: [10] * E for n in here}
    plans = [cache_plan(x, held_out(x["a"]), sizes, {"a": 20, "b": 20}) for x in (here, other)]
    assert plans[0]["layers"] == plans[1]["layers"] and plans[0]["hit_rates"] != plans[1]["hit_rates"]
    assert plans[0]["trace_tokens"] == 72 and plans[0]["held_out_tokens"] == 8
    assert plans[0]["pin"]["budget_bytes"] == 30 and plans[0]["pin"]["bytes"] == 30
    assert plans[0]["layers"][0]["bits"] == [4.0] * E and "next" not in plans[0]["layers"][1]
    row = plans[0]["layers"][0]["next"]
    assert all(len(r) == 2 * K == len(p) and p == sorted(p, reverse=True) for r, p in zip(*row.values(), strict=True))
    with pytest.raises(DataError, match="2 windows of text or more"):
        held_out(torch.zeros(1, 8))


def test_numbers_around_the_default():
    assert counts(2, 8) == [1, 2, 3, 4] and counts(1, 8) == [1, 2]
    assert counts(8, 64) == [4, 6, 8, 10, 12, 14, 16] and counts(8, 9) == [4, 6, 8]
    assert all(k in counts(k, 99) for k in range(1, 20))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_go_to_as_many_experts_as_they_are_told(name, tiny):
    model = as_loaded(tiny(name)).model
    views, before = mixtures(model), logits(model)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(5))
    default = default_of(model, views)
    assert default == 2
    for k in (1, 3):
        other = as_loaded(tiny(name, num_experts_per_tok=k)).model
        with going_to(model, views, default, k):
            assert all(((view.weights(x) != 0).sum(-1) == k).all() for view in views.values())
            assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model), before)
    with going_to(model, views, default, default):
        assert torch.equal(logits(model), before)


def test_a_number_that_groups_of_experts_do_not_allow_is_left_out(tiny):
    model = as_loaded(tiny("deepseek_v2", n_group=4, topk_group=1)).model
    views = mixtures(model)
    experts = {name: (1, [1] * 8) for name in views}
    found = profile(model, views, IDS, 100, 100, experts, 0.05, Silent())
    assert found["k"] == [1, 2] and found["not_followed"] == [3, 4] and found["active_params"] == [93, 94]


CHOSEN = {
    "calibration": {"windows": 2, "length": 24}, "exports": ["safetensors"], "expert_plan": {"windows": 12},
    "steps": [
        {"pmq": {"targets": ["*.experts.*"], "bits": 2.5, "group_size": 32, "rounding": "nearest"}},
        {"quantize": {"targets": ["*"], "ignore": ["*.experts.*"], "weights": "int8"}},
    ],
}  # fmt: skip


def test_the_manifest_says_it_of_the_compressed_model(tiny, tiny_tokenizer, text, tmp_path):
    made = [
        compress(tiny("mixtral"), Recipe.from_dict(CHOSEN), tokenizer=tiny_tokenizer, data=text, measure=False)
        for _ in range(2)
    ]
    plan = made[0].record["expert_plan"]
    assert json.dumps(plan) == json.dumps(made[1].record["expert_plan"])
    made[0].save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert json.loads(json.dumps(plan)) == again.record["expert_plan"] and again.recipe == made[0].recipe
    cache, numbers = plan["cache"], plan["dynamic_k"]
    tensors = again.tensors()
    for row in cache["layers"]:
        for number, size in enumerate(row["bytes"]):
            mine = [t for n, t in tensors.items() if n.startswith(f"{row['name']}.experts.{number}.")]
            assert len(mine) >= 6 and size == sum(t.numel() * t.element_size() for t in mine)
    assert len({b for row in cache["layers"] for b in row["bits"]}) == 2
    model = again.model(dense=True)
    windows = torch.tensor(tiny_tokenizer(text.read_text())["input_ids"][: 12 * 24]).view(12, 24)
    assert cache["trace_tokens"] == 11 * 24 and numbers["tokens"] == 23
    heard: list[torch.Tensor] = []
    view = mixtures(model)[cache["layers"][0]["name"]]
    logits = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731 - transformers 5 adds weights and indices
    view.module.gate.register_forward_hook(lambda _, args, out: heard.append(logits(out).topk(2).indices))
    losses = measure(torch_runner(model), windows[:-1]).losses
    n = torch.bincount(torch.cat(heard).flatten(), minlength=4)
    assert cache["layers"][0]["freq"] == [round((c + 0.25) / (11 * 24 * 2 + 1), 4) for c in n.tolist()]
    losses = measure(torch_runner(model), windows[-1:]).losses
    assert numbers["default"] == 2 and numbers["k"] == [1, 2, 3, 4]
    assert numbers["ppl"][1] == pytest.approx(losses.mean().exp().item(), abs=1e-4)
    steps = {b - a for a, b in zip(numbers["active_params"], numbers["active_params"][1:], strict=False)}
    assert steps == {2 * 3 * 64 * 96}  # two layers, three linears
    assert numbers["active_bytes"] == sorted(numbers["active_bytes"])
    most = 1.05 * numbers["ppl"][1]
    assert numbers["allowed"] == [k for k, p in zip(numbers["k"], numbers["ppl"], strict=True) if p <= most]


def test_what_cannot_be_planned_is_said(tiny, tiny_tokenizer, text):
    dense = {"expert_plan": {}, "steps": [{"quantize": {}}]}
    with pytest.raises(ModelError, match="has no layers of experts to plan for; drop expert_plan"):
        compress(tiny("llama"), Recipe.from_dict(dense), tokenizer=tiny_tokenizer, data=text)
    with pytest.raises(RecipeError, match=r"unknown option 'window'.*windows"):
        Recipe.from_dict(dense | {"expert_plan": {"window": 3}})
    assert plan_of(tiny("mixtral"), Recipe.from_dict(CHOSEN)).rows
