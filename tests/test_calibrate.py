"""Block-by-block calibration gives what plain hooks on a full forward give, for every family, and refuses the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.blockwise import placed, record, run_blocks
from compressor.calibrate import Site, calibrate, sites
from compressor.errors import DataError, ModelError, NumericsError
from compressor.model import as_loaded, blocks, linears
from compressor.progress import Silent
from compressor.statistics import AbsMax, ChannelSquare


def tokens(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 256, (count, length), generator=torch.Generator().manual_seed(1))


def plain_inputs(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every linear's inputs [T, K] over a plain forward of each window."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        return lambda _, args: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears(model).items()]
    with torch.no_grad():
        for window in windows:
            model(window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_statistics_equal_plain_hooks(tiny, family):
    model = as_loaded(tiny(family)).model
    windows = tokens()
    found = calibrate(model, windows, {ChannelSquare, AbsMax})
    plain = plain_inputs(model, windows)
    assert set(plain) == set(linears(model)) - set(found.unseen)
    for name, x in plain.items():
        assert found.seen(name)
        torch.testing.assert_close(found.value(name, ChannelSquare), x.square().mean(0).float(), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(found.value(name, AbsMax), x.abs().amax().float(), rtol=1e-5, atol=0)


def test_hidden_states_equal_plain_forward(tiny, family, monkeypatch):
    import compressor.blockwise as blockwise

    model = as_loaded(tiny(family)).model
    windows = tokens(2)
    outputs: list[torch.Tensor] = []
    run = blockwise.Call.run

    def keep(self, block, hidden):
        outputs.append(run(self, block, hidden))
        return outputs[-1]

    monkeypatch.setattr(blockwise.Call, "run", keep)

    from contextlib import nullcontext

    run_blocks(model, windows, blocks(model), lambda name: nullcontext(), Silent())
    last = blocks(model)[-1][1]
    expected: list[torch.Tensor] = []
    handle = last.register_forward_hook(lambda m, a, y: expected.append(y if isinstance(y, torch.Tensor) else y[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    handle.remove()
    for got, want in zip(outputs[-len(windows) :], expected, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def names_of(found: list[Site]) -> set[tuple[str, ...]]:
    return {tuple(n.rpartition("layers.0.")[2] for n in s.names) for s in found if "layers.0." in s.names[0]}


def test_sites_of_llama(tiny):
    model = as_loaded(tiny("llama")).model
    assert names_of(sites(model)) == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }


def test_sites_cover_every_linear_once(tiny, family):
    model = as_loaded(tiny(family)).model
    found = sites(model)
    listed = [n for s in found for n in s.names]
    assert sorted(listed) == sorted(linears(model))
    assert all(linears(model)[n].in_features == s.features for s in found for n in s.names)
    first = [s.names[0] for s in found]
    assert first == [n for n in linears(model) if n in first], "module order"


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Experts(nn.Module):
    """Four experts; tokens choose among the first three only."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, hidden_states, scale=None):
        flat = hidden_states[0]
        chosen = self.gate(flat)[:, :3].argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(flat[chosen == i])
        return (hidden_states + out[None],)


class Toy(nn.Module):
    """The least that calibration needs of a model: an embedding, blocks in a row, and get_input_embeddings."""

    def __init__(self, block=Experts, between=None, text_dependent=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([block(), block()])
        self.between, self.text_dependent = between, text_dependent
        nn.init.normal_(self.embed.weight)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(hidden_states=x, scale=x.mean() if self.text_dependent else None)[0]
            x = self.between(x) if self.between else x
        return x


def test_unused_expert_is_reported_and_borrows():
    model = Toy().eval()
    windows = torch.randint(32, (2, 64), generator=torch.Generator().manual_seed(0))
    found = calibrate(model, windows, {AbsMax, ChannelSquare})
    assert found.unseen == [f"layers.{b}.experts.3.{p}" for b in (0, 1) for p in ("up", "gate", "down")]
    assert not found.seen("layers.0.experts.3.up") and found.seen("layers.0.experts.1.up")
    by_first = {s.names[0]: s.names for s in found.sites}
    assert by_first["layers.0.experts.3.up"] == ("layers.0.experts.3.up", "layers.0.experts.3.gate")
    assert "layers.0.gate" not in {n for s in found.sites for n in s.names}
    used = torch.stack([found.value(f"layers.0.experts.{e}.up", AbsMax) for e in range(3)])
    assert found.value("layers.0.experts.3.up", AbsMax) == used.max()
    # Every token went to exactly one of the three, so the borrowed mean is that over all tokens.
    x = model.embed(windows).reshape(-1, 8)
    torch.testing.assert_close(found.value("layers.0.experts.3.up", ChannelSquare), x.square().mean(0))


def test_refuses_work_between_blocks():
    with pytest.raises(ModelError, match=r"layers\.1: its input is not the previous block's output"):
        calibrate(Toy(between=lambda x: x * 1.1).eval(), tokens(2, 8) % 32, {AbsMax})


def test_refuses_text_dependent_arguments():
    with pytest.raises(ModelError, match="depend on the text"):
        calibrate(Toy(text_dependent=True).eval(), tokens(2, 8) % 32, {AbsMax})


class Cache:
    """Grows with every forward that it is passed to."""

    def __init__(self):
        self.calls = 0

    def get_seq_length(self):
        return self.calls


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, scale=None):
        if isinstance(scale, Cache):
            scale.calls += 1
        seen = scale.calls if isinstance(scale, Cache) else 1
        return (self.linear(hidden_states) * seen,)


def test_a_cache_is_not_carried_from_window_to_window(monkeypatch):
    model = Toy(Caching).eval()
    plain = Toy(Caching).eval()
    monkeypatch.setattr(model, "forward", lambda input_ids: run_with_caches(model, input_ids))
    windows = tokens(4, 8) % 32
    found, expected = calibrate(model, windows, {AbsMax}), calibrate(plain, windows, {AbsMax})
    assert found.value("layers.1.linear", AbsMax) == expected.value("layers.1.linear", AbsMax)


def run_with_caches(model: Toy, input_ids: torch.Tensor) -> None:
    x = model.embed(input_ids)
    for layer in model.layers:
        x = layer(hidden_states=x, scale=Cache())[0]


def test_nan_in_activations_names_the_layer(tiny):
    model = as_loaded(tiny("llama")).model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.down_proj"):
        calibrate(model, tokens(), {AbsMax})


def test_names_choose_and_later_blocks_do_not_run(tiny):
    model = as_loaded(tiny("llama")).model
    ran = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: ran.append(1))
    chosen = {"model.layers.0.mlp.up_proj"}
    found = calibrate(model, tokens(5), {AbsMax}, chosen)
    assert [s.names for s in found.sites] == [tuple(chosen)] and not found.unseen
    assert not ran, "block 1 has nothing to measure"
    with pytest.raises(KeyError):
        found.value("model.layers.0.mlp.gate_proj", AbsMax)


def test_one_window_of_one_token(tiny):
    found = calibrate(as_loaded(tiny("gpt2")).model, torch.tensor([[7]]), {ChannelSquare})
    assert found.value("transformer.h.1.mlp.c_proj", ChannelSquare).shape == (96,)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 0)])
def test_rejects_no_windows(tiny, shape):
    with pytest.raises(DataError, match=r"\[S, L\]"):
        calibrate(as_loaded(tiny("llama")).model, torch.zeros(shape, dtype=torch.int64), {AbsMax})


def test_progress_counts_to_its_total(tiny):
    class Counting(Silent):
        total, done = 0, 0

        def stage(self, name, total=None):
            self.total = total

        def advance(self, n=1):
            self.done += n

    counting = Counting()
    calibrate(as_loaded(tiny("llama")).model, tokens(3), {AbsMax}, progress=counting)
    assert counting.done == counting.total == 6


def test_leaves_no_hook_and_no_file(tiny, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = as_loaded(tiny("bert")).model
    calibrate(model, tokens(), {AbsMax})
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_block_visits_a_device_and_comes_back_untouched():
    block = torch.nn.Linear(3, 5)
    weight, where, values = block.weight, block.weight.data_ptr(), block.weight.detach().clone()
    with placed(block, "cuda"):
        assert block.weight is weight and weight.is_cuda
        block.bias = torch.nn.Parameter(torch.ones(5, device="cuda"))  # what a fold leaves
    assert block.weight is weight and weight.data_ptr() == where and torch.equal(weight, values)
    assert torch.equal(block.bias, torch.ones(5))
    with placed(block, None):
        assert not weight.is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_modules_that_share_tensors_visit_a_device_together():
    original = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))
    changed = torch.nn.Sequential(original[0], torch.nn.Linear(5, 2))
    with placed(original, "cuda"), placed(changed, "cuda"):
        assert all(p.is_cuda for p in (*original.parameters(), *changed.parameters()))
    assert not any(p.is_cuda for p in (*original.parameters(), *changed.parameters()))


def test_stand_ins_leave_no_trace_and_see_what_happens_between_blocks(tiny):
    model = as_loaded(tiny("llama")).model
    named = blocks(model)
    expected = model(tokens(1, 8)).logits
    record(model, tokens(1, 8)[0], named)
    assert all("forward" not in vars(block) for _, block in named)
    assert torch.equal(model(tokens(1, 8)).logits, expected)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ModelError, match="its input is not the previous block's output"):
        record(model, tokens(1, 8)[0], named)
