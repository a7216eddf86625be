"""The probe finds what is for nothing, and changes nothing."""

import json

import torch
from typer.testing import CliRunner

from compressor.cli import app
from compressor.progress import Silent
from compressor.tolerance import tolerances


def test_what_is_for_nothing_is_found(tiny):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 48:] = 0
        model.model.layers[0].self_attn.o_proj.weight[:, :32] = 0
    before = {n: p.clone() for n, p in model.state_dict().items()}
    windows = torch.randint(4, 288, (8, 40), generator=torch.Generator().manual_seed(0))
    first, second = tolerances(model, windows, 1e-4, Silent())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    channels = [row["channels"][f"{row['block']}.mlp.down_proj"] for row in (first, second)]
    assert channels[0] < 0.2 and 0.45 < channels[1] < 0.7
    heads = [row["heads"][f"{row['block']}.self_attn.o_proj"] for row in (first, second)]
    assert heads[0] == 0 and heads[1] > 0.1
    assert 0 < first["turned"] < 1


def test_more_may_go_where_more_may_be_lost(tiny):
    windows = torch.randint(4, 288, (8, 40), generator=torch.Generator().manual_seed(0))
    shares = [
        tolerances(tiny("opt"), windows, error, Silent())[0]["channels"]["model.decoder.layers.0.fc2"]
        for error in (0.01, 0.2)
    ]
    assert shares[0] < shares[1]


def test_from_the_command_line(tiny_folder, tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose * 2)
    ran = CliRunner().invoke(
        app, ["probe", str(tiny_folder("llama")), "--data", str(path), "--windows", "2", "--length", "24", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert [row["block"] for row in json.loads(ran.stdout)] == ["model.layers.0", "model.layers.1"]
