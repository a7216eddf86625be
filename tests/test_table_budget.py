"""Tables that are auto: their cost is the KL that is measured, and they share the budget of the mixed_bits step."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import Recipe, compress, load
from compressor.allocation import Choice, allocate
from compressor.errors import RecipeError
from compressor.layers import build
from compressor.model import as_loaded, embedding_name, head_name, linears
from compressor.plan import plan_of
from compressor.sensitivity import output_fisher
from compressor.table_budget import auto_tables, head_among, weighed
from compressor.tables import fitting, head_importance, pack_tables, packed_table

WINDOWS = torch.randint(4, 288, (8, 64), generator=torch.Generator().manual_seed(1))


def recipe(*overrides: str, **options: Any) -> Recipe:
    """4 bits or 8 for the linears, tables auto."""
    data = {
        "embedding": "auto",
        "lm_head": "auto",
        "calibration": {"windows": 3, "length": 24},
        "exports": ["safetensors"],
        "steps": [{"mixed_bits": {"choices": ["nvfp4", "int8"], **(options or {"bits": 6.0})}}],
    }
    return Recipe.from_dict(data, overrides)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    out = model(input_ids=WINDOWS)
    return out.logits.double().log_softmax(-1) if hasattr(out, "logits") else out.last_hidden_state.double()


def divergence(model: Any, before: Tensor) -> float:
    """Mean KL a token, or 1 − cosine of an encoder."""
    after = outputs(model)
    if head_name(model) is None:
        return (1 - torch.cosine_similarity(before, after, dim=-1)).mean().item()
    return (before.exp() * (before - after)).sum(-1).mean().item()


def measured_tables(model: Any, kl: bool = True) -> dict[str, Any]:
    """What the pipeline weighs, on WINDOWS."""
    tables = auto_tables(model, recipe())
    head, embedding = head_among(model, tables), embedding_name(model)
    names = [*linears(model), *([head] if head else [])]
    fisher = output_fisher(model, WINDOWS, names, torch.Generator().manual_seed(0), table=embedding) if kl else None
    return weighed(model, tables, WINDOWS, head_importance(model, WINDOWS) if head else None, fisher)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("gemma3", True), ("gpt2", True), ("bert", False)]
)
def test_the_cost_of_a_table_is_the_kl_of_the_model(tiny: Any, architecture: str, tied: bool) -> None:
    """gemma3 multiplies what it reads by 8, gpt2 adds positions, bert normalises before the first block."""
    model = as_loaded(tiny(architecture, **({} if architecture == "bert" else {"tie_word_embeddings": tied}))).model
    before, ratios = outputs(model), {}
    importance = None if architecture == "bert" else head_importance(model, WINDOWS)
    for name, table in measured_tables(model).items():
        module = model.get_submodule(name)
        own, places = module.weight, fitting(*module.weight.shape)
        assert {c.name for c in table.choices} == set(places) and table.shape == tuple(own.shape)
        for choice in table.choices:
            assert choice.size_bytes == places[choice.name].size_bytes
            if choice.name not in ("nvfp4", "int4", "int8-row"):
                continue
            weights = importance if tied or name == head_name(model) else None
            decoded = build(packed_table(module, choice.name, places[choice.name], weights)).dequantize()
            own.data, original = decoded, own.data
            ratios[name, choice.name] = choice.cost / divergence(model, before)
            own.data = original
    assert len(ratios) == (6 if architecture == "llama" and not tied else 3)
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_rows_are_weighed_by_the_gradient_of_the_table(tiny: Any) -> None:
    """Against autograd's own gradient of the table, drawn with the same generator."""
    model, windows = tiny("gemma3"), WINDOWS[:2, :16]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # the gradient of one use only
    table = model.get_input_embeddings().weight
    found = output_fisher(model, windows, [], torch.Generator().manual_seed(0), table="model.embed_tokens").rows
    assert found is not None
    draw, squares = torch.Generator().manual_seed(0), torch.zeros_like(table)
    for window in windows:
        scores = model(input_ids=window[None]).logits[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        squares += torch.autograd.grad(scores.gather(-1, drawn).sum(), table)[0].square()
    assert torch.equal(found.ids, windows.unique())
    torch.testing.assert_close(found.squares, squares[found.ids] / windows.numel(), rtol=1e-4, atol=1e-12)
    assert not any(m._forward_hooks for m in model.modules())


def brute_force(groups: dict[str, list[Choice]], budget: int) -> float:
    picks = (p for p in itertools.product(*groups.values()) if sum(c.size_bytes for c in p) <= budget)
    return min(math.fsum(c.cost for c in p) for p in picks)


def test_the_comparison_has_every_pair_of_a_format_and_a_table() -> None:
    groups = {
        "a": [Choice("four", 4_000_000, 5.0), Choice("eight", 8_000_000, 0.1)],
        "b": [Choice("four", 4_000_000, 9.0), Choice("eight", 8_000_000, 0.2)],
        "table": [Choice("row", 3_000_000, 0.3), Choice("int4", 1_000_000, 7.0), Choice("bf16", 6_000_000, 0.0)],
    }
    for budget in (9_000_000, 11_000_000, 13_000_000, 15_500_000, 17_000_000, 30_000_000):
        found = allocate(groups, budget, {"table"})
        assert found.cost == pytest.approx(brute_force(groups, budget))
        fit = [cost for _, cost, fits in found.uniform.values() if fits]
        assert fit and found.cost <= min(fit)
    found = allocate(groups, 15_500_000, {"table"})
    assert found.sentence() == (
        "mixed (1 four, 1 eight, table row): cost 5.5 in 15.00 of 15.50 MB; all four, tables bf16: 14 in 14.00 MB; "
        "all eight, tables int4: 7.3 in 17.00 MB (over budget)"
    )


def test_a_solver_that_fails_gives_the_best_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor import allocation

    groups = {
        "a": [Choice("four", 40, 5.0), Choice("eight", 80, 0.1)],
        "table": [Choice("row", 30, 0.3), Choice("int4", 10, 7.0)],
    }
    monkeypatch.setattr(allocation, "_solve", lambda table, budget: None)
    for budget, expected in ((60, {"a": "four", "table": "int4"}), (100, {"a": "four", "table": "row"})):
        assert allocate(groups, budget, {"table"}).choices == expected
    assert allocate(groups, 110, {"table"}).choices == {"a": "eight", "table": "row"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sensitivity", ["kl", "error"])
def test_a_recipe_meets_its_budget_with_the_tables(
    tiny: Any, tiny_tokenizer: Any, tmp_path: Path, tied: bool, sensitivity: str
) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    chosen = recipe(bits=7.0, sensitivity=sensitivity)
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    weights = {n: m.weight.numel() for n, m in [*linears(model).items(), *((n, model.get_submodule(n)) for n in names)]}
    planned = {row.name: row for row in plan_of(model, chosen).rows}
    assert list(planned) == list(weights)
    assert all(planned[n].action == "mixed" and planned[n].note.startswith("one of int8-row, int8") for n in names)
    assert sum(row.bytes_after for row in planned.values()) * 8 <= 7.0 * sum(weights.values())
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, measure=False)
    report = artifact.record["steps"]["1 mixed_bits"]
    formats = {name: found["format"] for name, found in report["tables"].items()}
    assert list(formats) == names
    for name, found in report["tables"].items():
        assert set(found["cost"]) == set(found["size_bytes"]) == {*fitting(288, 64)}
        assert f"{name} {formats[name]}" in report["summary"]
    sizes = {"lm_head" if tied else "": 0}  # a tied head adds nothing
    for name in weights:
        if formats.get(name) == "bf16":
            sizes[name] = artifact.kept[f"{name}.weight"].nbytes
            assert artifact.record["kept"][name] == "budget: bf16"
        else:
            sizes[name] = artifact.packed[name].size_bytes
    assert report["size_bytes"] <= report["budget_bytes"] == int(7.0 * sum(weights.values()) / 8)
    # EXTRA_BYTES of a linear (its global scale or shape) are not in the plan, as for quantize.
    assert sum(sizes.values()) - 20 * len(linears(model)) <= report["size_bytes"]
    again = pack_tables(model, chosen, torch.ones(64), decided=formats).packed
    outside = {n: p for n, p in artifact.packed.items() if ".layers." not in n}
    assert {n: (p.kind, p.attributes) for n, p in again.items()} == {
        n: (p.kind, p.attributes) for n, p in outside.items()
    }
    folder = artifact.save(tmp_path / "out")
    assert "embedding: auto" in (folder / "recipe.yaml").read_text()
    assert json.loads((folder / "manifest.json").read_text())["steps"]["1 mixed_bits"]["tables"] == report["tables"]
    ids = WINDOWS[:1, :20]
    with torch.inference_mode():
        assert torch.equal(load(folder).model()(input_ids=ids).logits, artifact.model()(input_ids=ids).logits)


def test_more_bytes_go_where_they_are_worth_most(tiny: Any, tiny_tokenizer: Any) -> None:
    """Growing budgets: what is predicted never grows, and the tables pass from four bits to sixteen."""
    seen = []
    for bits in (4.6, 6.0, 8.4, 12.0):
        artifact = compress(tiny("llama"), recipe(bits=bits), tokenizer=tiny_tokenizer, measure=False)
        report = artifact.record["steps"]["1 mixed_bits"]
        costs = [table["cost"][table["format"]] for table in report["tables"].values()]
        seen.append((float(report["summary"].partition("cost ")[2].split()[0]), sum(costs)))
        formats = {table["format"] for table in report["tables"].values()}
        assert (bits > 5 or formats <= {"nvfp4", "mxfp4", "int4", "int4-g64", "int4-g128"}) and (
            bits < 11 or "bf16" in formats
        )
    assert all(a[0] > b[0] and a[1] >= b[1] for a, b in itertools.pairwise(seen))


def test_one_table_may_be_auto_beside_one_that_is_not(tiny: Any, tiny_tokenizer: Any) -> None:
    chosen = recipe("lm_head=int4")
    artifact = compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, measure=False)
    assert list(artifact.record["steps"]["1 mixed_bits"]["tables"]) == ["model.embed_tokens"]
    assert artifact.packed["lm_head"].attributes["bits"] == 4
    rows = {row.name: row.action for row in plan_of(tiny("llama"), chosen).rows}
    assert (rows["model.embed_tokens"], rows["lm_head"]) == ("mixed", "int4 g32")


def test_formats_that_do_not_fit_are_no_choices(tiny: Any, tiny_tokenizer: Any) -> None:
    model = tiny("llama", hidden_size=72, num_attention_heads=2, num_key_value_heads=2)
    chosen = recipe("mixed_bits.on_misfit=pad", bits=9.0)
    assert [c.name for c in auto_tables(model, chosen)["lm_head"].choices] == ["int8-row", "bf16"]
    row = next(r for r in plan_of(model, chosen).rows if r.name == "lm_head")
    assert row.note == "one of int8-row, bf16"
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, measure=False)
    report = artifact.record["steps"]["1 mixed_bits"]
    assert {t["format"] for t in report["tables"].values()} <= {"int8-row", "bf16"}
    assert report["size_bytes"] <= report["budget_bytes"]


def test_an_encoder_has_an_embedding_only(tiny: Any, tiny_tokenizer: Any) -> None:
    artifact = compress(tiny("bert"), recipe(bits=5.0), tokenizer=tiny_tokenizer, measure=False)
    report = artifact.record["steps"]["1 mixed_bits"]
    assert list(report["tables"]) == ["embeddings.word_embeddings"]
    assert artifact.packed["embeddings.word_embeddings"].kind in ("fp4_embedding", "int_embedding")


def test_a_rotation_that_unties_makes_two_tables(tiny: Any, tiny_tokenizer: Any) -> None:
    steps = [{"rotate": {"residual": "hadamard"}}, {"mixed_bits": {"bits": 6.0, "choices": ["nvfp4", "int8"]}}]
    chosen = Recipe.from_dict({"embedding": "auto", "lm_head": "auto", "steps": steps, "exports": ["safetensors"]})
    model = tiny("llama", tie_word_embeddings=True)
    mixed = [row.name for row in plan_of(model, chosen).rows if row.action == "mixed"]
    assert mixed[-2:] == ["model.embed_tokens", "lm_head"]
    artifact = compress(model, chosen, tokenizer=tiny_tokenizer, measure=False)
    assert list(artifact.record["steps"]["2 mixed_bits"]["tables"]) == ["model.embed_tokens", "lm_head"]


def test_what_cannot_be_is_one_sentence(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps:\n  - quantize: {weights: int4}\nlm_head: auto\n")
    with pytest.raises(RecipeError, match=r"mine.yaml line 3: lm_head is 'auto', .* no mixed_bits step; give it one"):
        Recipe.load(file)
    with pytest.raises(RecipeError, match=r"--set embedding=auto: embedding is 'auto'.*no mixed_bits step"):
        Recipe.load("nvfp4a16", ["embedding=auto"])
    two = [{"mixed_bits": {"bits": 5.0, "targets": [t]}} for t in ("*.mlp.*", "*.self_attn.*")]
    with pytest.raises(RecipeError, match="the recipe has 2 mixed_bits steps"):
        Recipe.from_dict({"embedding": "auto", "steps": two})
    with pytest.raises(RecipeError, match=r"lm_head: bf16 differs from embedding: auto, .* one tied table"):
        plan_of(tiny("llama", tie_word_embeddings=True), recipe("lm_head=bf16"))
    # 14 linears of 57344 weights at 4.5 bits and two tables of 18432 at 4.25: 0.0518 MB.
    with pytest.raises(RecipeError, match=r"size_mb is 0\.05, .* these layers and the tables that are auto is 0\.05"):
        plan_of(tiny("llama"), recipe(size_mb=0.05))
