"""`compress probe --sparsity`: what is massive, what neurons are left out, the table, the picture and the errors."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from typer.testing import CliRunner

from compressor import chart
from compressor.cli import app
from compressor.massive import find, judge, largest


def hidden(ratio, scale=1.0, channel=5, token=3):
    """[20, 64] whose median is `scale` and whose one value is `ratio` of them."""
    made = torch.full((20, 64), scale)
    made[token, channel] = ratio * scale
    return made


def of(*states, blocks=4):
    return judge({f"b{i}": [largest(state) for state in states] for i in range(blocks)})


def test_criteria():
    found = of(hidden(1200.0), hidden(1200.0))
    assert found.strict.channels == found.relative.channels == found.small.channels == [5]
    assert found.strict.tokens == {3: 8}
    found = of(hidden(900.0), hidden(900.0))
    assert not found.strict and not found.relative and found.small.channels == [5]
    found = of(hidden(1200.0, 50 / 1200), hidden(1200.0, 50 / 1200))
    assert not found.strict and found.relative.channels == found.small.channels == [5]
    assert not of(hidden(40.0)).small
    assert not of(*(hidden(900.0, channel=c) for c in range(5))).small  # never the same channel
    once = judge({f"b{i}": [largest(hidden(900.0 if i == 0 else 2.0))] for i in range(8)})
    assert not once.small and once.onset is None and once.offset == "b1"


def test_the_order_of_windows_does_not_matter():
    states = [hidden(1200.0), hidden(900.0, channel=7), hidden(1500.0, token=0)]
    assert of(*states) == of(*states[::-1])


def test_a_model_with_a_massive_channel_is_found_out(tiny):
    model = tiny("llama")
    assert not find(model, torch.arange(4, 36)[None]).small
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[11] *= 3000
    found = find(model, torch.arange(4, 36)[None])
    assert found.small.channels == [11] and set(found.ratios) == {"model.layers.0", "model.layers.1"}


def test_bars_are_an_svg_of_their_heights():
    made = ElementTree.fromstring(chart.bars("a < b", ["0", "1", "2"], [0.0, 0.5, 2.0], "x", "y"))
    tall = [float(e.get("height")) for e in made.iter() if e.tag.endswith("rect")][1:]
    assert tall[0] == 0 and tall[1] == pytest.approx(tall[2] / 2) and "a < b" in "".join(made.itertext())


def test_the_command(tiny_folder, text, tmp_path):
    said = ["probe", str(tiny_folder("llama")), "--data", str(text), "--windows", "4", "--length", "32", "--sparsity"]
    picture = tmp_path / "out.svg"
    result = CliRunner().invoke(app, [*said, "--ppl", "5", "--json", "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["layer"] for r in found["layers"]] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert 0 < found["left_out"] <= 1 and found["ratio"] <= 1.05
    assert picture.read_text().count("<title>") == 2
    shown = CliRunner().invoke(app, said)
    assert shown.exit_code == 0 and "PPL-1 %" in shown.output and "massive, strict: none" in shown.output


def test_errors(tiny_folder, text, tmp_path):
    folder = str(tiny_folder("llama"))
    for options, message in (
        (["--plot", "x.svg"], "give both, or neither"),
        (["--sparsity", "--ppl", "0"], "must be above 0 per cent"),
        (["--sparsity", "--plot", str(tmp_path / "x.png")], "ends in .svg"),
        (["--sparsity", "--windows", "1", "--length", "32", "--data", str(text)], "give 2 windows or more"),
    ):
        result = CliRunner().invoke(app, ["probe", folder, *options])
        assert result.exit_code and message in result.output, result.output
    encoder = ["probe", str(tiny_folder("bert")), "--sparsity", "--data", str(text), "--length", "32"]
    assert "is an encoder" in CliRunner().invoke(app, encoder).output


def test_medians_ignore_what_is_excluded():
    from compressor.sparsity_probe import _excluded

    x = torch.rand(100, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    assert _excluded(x, torch.ones(8)) == (0.0, 1.0)
    x[:30] *= 1000
    share, moved = _excluded(x, torch.ones(8))
    assert share == 0.3 and moved > 1.1
