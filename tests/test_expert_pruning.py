"""Experts that are left out: which, that the rest computes what a router that never chose them would, who loads it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor import Recipe, compress
from compressor.errors import ModelError, RecipeError
from compressor.methods.experts import Experts
from compressor.model import linears, twin
from compressor.plan import plan_of
from compressor.progress import Silent
from compressor.run import Run

IDS = torch.arange(4, 40)[None]
WINDOWS = torch.randint(4, 288, (3, 24), generator=torch.Generator().manual_seed(5))
# Weights of the chosen that sum to one, and that do not.
KINDS = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 96, "norm_topk_prob": False},
}


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS)[0]


@pytest.fixture
def mixture(tiny):
    """A tiny model of 4 experts, with weights as in a checkpoint."""

    def make(kind):
        model = tiny(kind, **KINDS[kind])
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        return model

    return make


def rewritten(model, **options):
    """(what the step alone makes of the model, its report)"""
    changed = twin(model)
    run = Run(WINDOWS, torch.float32, torch.device("cpu"), Silent(), model, lambda _: WINDOWS)
    return changed, Experts(**options).rewrite(changed, set(linears(changed)), run)


@pytest.mark.parametrize("kind", list(KINDS))
def test_left_out_is_never_chosen(mixture, kind):
    model = mixture(kind)
    before = logits(model)
    changed, report = rewritten(model, prune=0.25)
    assert torch.equal(logits(model), before)  # the original is as it was
    for layer, row in report["layers"].items():
        gone = set(range(4)) - set(row["kept"])
        assert len(gone) == 1 and changed.get_submodule(layer).num_experts == 3
        gate = model.get_submodule(layer).gate

        def never(_, args, scores, gone=gone):
            return scores.index_fill(1, torch.tensor(sorted(gone)), -torch.inf)

        gate.register_forward_hook(never)
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(changed), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("score", ["reap", "activation"])
def test_scores_are_those_of_the_formula(mixture, kind, score):
    model = mixture(kind)
    seen = []
    moe = next(m for m in model.modules() if hasattr(m, "experts"))
    handle = moe.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None])
        handle.remove()
        x = torch.cat(seen)
        top, chosen = moe.gate(x).softmax(-1).topk(2)
        if kind == "mixtral" or model.config.norm_topk_prob:
            top = top / top.sum(-1, keepdim=True)
        expected = []
        for number, expert in enumerate(moe.experts):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            norms = expert(x[tokens]).norm(dim=-1)
            expected.append((norms * (top[tokens, place] if score == "reap" else 1)).mean().item())
    _, report = rewritten(model, prune=0.25, score=score)
    row = next(iter(report["layers"].values()))
    assert row["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert set(range(4)) - set(row["kept"]) == {expected.index(min(expected))}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plain_config_says_it(mixture, tiny_tokenizer, text, tmp_path, kind):
    steps = [{"experts": {"prune": 0.25}}, {"cfsp": {"prune": 0.25, "allocation": "uniform"}}]
    recipe = {"calibration": {"windows": 3, "length": 24}, "exports": ["safetensors"], "steps": steps}
    artifact = compress(mixture(kind), Recipe.from_dict(recipe), tokenizer=tiny_tokenizer, data=text, measure=False)
    assert artifact.record["steps"]["1 experts"]["kept"] == 3 and not artifact.structure
    artifact.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(stock), logits(artifact.model()), atol=2e-4, rtol=1e-3)
    assert sum(n.endswith("experts.2.down_proj") or n.endswith("experts.2.w2") for n in linears(stock)) == 2
    assert not any(".experts.3." in n for n in linears(stock))


def test_no_whole_expert_changes_no_bit(mixture):
    model = mixture("mixtral")
    changed, report = rewritten(model, prune=0.1)
    assert torch.equal(logits(changed), logits(model)) and "nothing" in report["pruned"]


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        ({"prune": 0.75}, "mixtral", "leaves 1 of 4 experts in .*, and a token goes to 2; prune at most 0.5"),
        ({"targets": ["*.experts.0.*"]}, "mixtral", "only some are targets"),
        ({}, "llama", "finds no layer of experts"),
        ({"prune": 1.0}, "mixtral", "prune 1 is not a share"),
    ],
)
def test_what_cannot_be_is_said(tiny, step, kind, message):
    recipe = {"exports": ["safetensors"], "steps": [{"experts": step}]}
    with pytest.raises((ModelError, RecipeError), match=message):
        plan_of(tiny(kind), Recipe.from_dict(recipe))
