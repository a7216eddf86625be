"""GPTQ: its objective, its order, what it does with damaged statistics; grids of every format."""

import itertools

import pytest
import torch

from compressor.errors import NumericsError
from compressor.kernels import native
from compressor.layers import Packed, build
from compressor.methods import gptq, scale_search
from compressor.methods.grid import ELEMENTS, LIMITS, Grid

K = 96
FORMATS = [("nvfp4", 16), ("mxfp4", 32), ("int1", 32), ("int2", 32), ("int3", 32)]
FORMATS += [("int4", 32), ("int4", None), ("int8", None), ("fp8", None)]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(5)


def problem(rng, rows=40):
    """A weight and the Gram matrix of correlated inputs."""
    x = torch.randn(600, K, generator=rng) @ torch.randn(K, K, generator=rng) * torch.rand(K, generator=rng)
    return torch.randn(rows, K, generator=rng), x.T @ x / len(x)


def grid_of(weight, gram, format, group):
    divisor = torch.tensor([256.0]) if format == "nvfp4" else None
    return scale_search.choose(format, weight, group, gram.diagonal(), "weighted", divisor)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_beats_nearest_on_its_objective(rng, format, group):
    weight, gram = problem(rng)
    grid = grid_of(weight, gram, format, group)
    step = grid.columns(K)
    nearest = gptq.error(weight, grid.codes(weight) * step, gram)
    rounded = gptq.error(weight, gptq.round_columns(weight, gptq.factorize(gram, 0.01), grid) * step, gram)
    assert rounded < (0.75 if format == "int1" else 0.7) * nearest


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_codes_are_on_the_grid_and_survive_packing(rng, format, group):
    weight, gram = problem(rng)
    grid = grid_of(weight, gram, format, group)
    codes = gptq.round_columns(weight, gptq.factorize(gram, 0.01), grid)
    assert torch.equal(ELEMENTS[format](codes), codes)
    kind = {"nvfp4": "fp4_linear", "mxfp4": "fp4_linear", "fp8": "fp8_linear"}.get(format, "int_linear")
    attributes = {"in_features": K, "out_features": 40, "activations": "none", "group_size": group}
    if kind == "int_linear":
        attributes |= {"bits": int(format[3:])}
    elif kind == "fp4_linear":
        attributes |= {"format": format}
    assert torch.equal(build(Packed(kind, grid.pack(codes), attributes)).dequantize(), codes * grid.columns(K))


def test_a_diagonal_gram_is_round_to_nearest(rng):
    weight, _ = problem(rng)
    gram = torch.diag(torch.rand(K, generator=rng) + 0.1)
    grid = grid_of(weight, gram, "int4", 32)
    assert torch.equal(gptq.round_columns(weight, gptq.factorize(gram, 0.01), grid), grid.codes(weight))


def test_near_the_optimum_of_a_problem_small_enough_to_enumerate(rng):
    """Four weights on three values each: GPTQ's error is close to the best of all 81, and nearest is not."""
    x = torch.randn(200, 4, generator=rng) @ torch.randn(4, 4, generator=rng)
    gram, weight = x.T @ x / len(x), torch.rand(50, 4, generator=rng) * 2 - 1
    grid = Grid("int2", torch.ones(50, 1))
    points = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)))

    def cost(codes):
        return (((codes - weight) @ gram) * (codes - weight)).sum(-1)

    best = torch.stack([cost(p.expand(50, 4)) for p in points]).amin(0).sum()
    found = cost(gptq.round_columns(weight, gptq.factorize(gram, 1e-4), grid)).sum()
    nearest = cost(grid.codes(weight)).sum()
    assert best <= found * (1 + 1e-5) and found < 1.5 * best < nearest


def test_blocks_of_columns_change_nothing(rng, monkeypatch):
    weight, gram = problem(rng)
    grid, hessian = grid_of(weight, gram, "nvfp4", 16), gptq.factorize(gram, 0.01)
    whole = gptq.round_columns(weight, hessian, grid)
    monkeypatch.setattr(gptq, "BLOCK", 7)
    # Sums in another order can move a value across a rounding threshold, now and then.
    assert (gptq.round_columns(weight, hessian, grid) == whole).float().mean() > 0.99


def test_channels_that_never_fire_keep_their_nearest_codes(rng):
    weight, gram = problem(rng)
    gram[3], gram[:, 3] = 0, 0
    grid = grid_of(weight, gram, "int4", 32)
    codes = gptq.round_columns(weight, gptq.factorize(gram, 0.01), grid)
    assert torch.equal(codes[:, 3], grid.codes(weight)[:, 3])


def test_damping_grows_until_the_matrix_can_be_factorized(rng):
    x = torch.randn(4, K, generator=rng)  # rank 4 of 96
    gram = x.T @ x - torch.eye(K) * 0.02  # and not quite positive, as float32 sums can be
    assert gptq.factorize(gram, 0.001).damping > 0.001
    with pytest.raises(NumericsError, match=r"down_proj: XᵀX .* rounding: nearest"):
        gptq.factorize(-torch.ones(K, K) + 2 * torch.eye(K), 0.01, "layers.3.down_proj")


@pytest.mark.parametrize("format", LIMITS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (1, 1), (9, 63)])
def test_the_gpu_kernel_is_its_twin(rng, format, rows, columns):
    """On a GPU where there is one, else in triton's interpreter (conftest.py)."""
    pytest.importorskip("triton")
    from compressor.kernels import gptq_columns

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, step, u = _block(rng, rows, columns)
    expected = gptq.round_block(weight, step, u, Grid(format, step))
    columnwise = u.to(device).T.contiguous().T  # as a triangular solve on a GPU leaves it
    found = gptq_columns.round_block(weight.to(device), step.to(device), columnwise, LIMITS[format])
    _agree(found, expected)


@pytest.mark.skipif(not native.built(), reason="the library of fused CPU ops was not built")
@pytest.mark.parametrize("format", LIMITS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (1, 1), (33, 63), (160, 128)])
def test_the_cpu_kernel_is_its_twin(rng, format, rows, columns):
    weight, step, u = _block(rng, rows, columns)
    expected = gptq.round_block(weight, step, u, Grid(format, step))
    found = native.gptq_block(weight, step, u, LIMITS[format])
    _agree(found, expected)
    with pytest.raises(ValueError, match="at most 128 columns, got 129"):
        native.gptq_block(torch.ones(1, 129), torch.ones(1, 129), torch.eye(129), LIMITS[format])


def _block(rng, rows, columns):
    weight = torch.randn(rows, columns, generator=rng) * 20
    step = torch.rand(rows, columns, generator=rng) * 3 + 0.01
    u = torch.randn(columns, columns, generator=rng).triu_() * 0.1 + torch.eye(columns)
    weight[0, 0] = step[0, 0] * 2.5  # a tie goes to the even code
    return weight, step, u


def _agree(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        # A sum's order can tip one code over, after which that row is another one.
        same = torch.isclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-4).all(1)
        assert same.float().mean() >= 0.75, (ours.cpu() - theirs).abs().amax()


@pytest.mark.parametrize("format", LIMITS)
def test_limits_describe_the_element_grid(format):
    low, high, binade, unit = LIMITS[format]
    x = torch.cat([torch.linspace(-2 * high, 2 * high, 9999), torch.linspace(-2, 2, 4001)])
    clipped = x.clamp(low, high)
    power = torch.exp2(torch.floor(torch.log2(clipped.abs().clamp_min(1e-30))))
    grain = power.clamp_min(binade) * unit if binade else torch.ones_like(x)
    assert torch.equal(ELEMENTS[format](x), torch.round(clipped / grain) * grain)
