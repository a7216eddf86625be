"""Training brings a pruned model nearer to the original, goes on where it stopped, and leaves nothing behind."""

import builtins

import pytest
import torch

from compressor import Recipe, compress, evaluate
from compressor.data import windows
from compressor.errors import DataError, RecipeError
from compressor.methods.recover import _Checkpoint
from compressor.model import linears
from compressor.pipeline import QUALITY_WINDOWS

# "cpu:0" is another device than the model's "cpu" to us: what runs there is a copy, as on any device.
DEVICES = ["cpu", "cpu:0", *(["cuda"] if torch.cuda.is_available() else [])]
TRAIN = {"windows": 12, "batch": 2, "epochs": 2, "rank": 4, "lr": 3e-3}


def recipe(train):
    return Recipe.from_dict(
        {
            "calibration": {"windows": 3, "length": 24, "dtype": "float32"},
            "steps": [{"cfsp": {"prune": 0.5}}, {"recover": train}],
        }
    )


@pytest.fixture
def recovered(tiny, tiny_tokenizer, text):
    pytest.importorskip("peft")

    def run(train, model=None, device=None):
        return compress(
            model or tiny("llama"),
            recipe(train),
            tokenizer=tiny_tokenizer,
            data=text,
            quality_text=text,
            device=device,
        )

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_it_comes_back_and_the_original_stays(recovered, tiny, device):
    model = tiny("llama")
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    artifact = recovered(TRAIN, model, device)
    pruned, trained = artifact.record["ledger"]
    assert trained["kl"] < 0.8 * pruned["kl"]
    report = artifact.record["steps"]["2 recover"]
    assert report["steps"] == 12 and report["windows"] == 12
    assert sum(report["ranks"].values()) == 8 and all(r % 2 == 0 for r in report["ranks"].values())
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    rebuilt = artifact.model()
    assert not any("lora" in name for name, _ in rebuilt.named_modules())
    assert set(linears(rebuilt)) == set(linears(model))


def test_it_goes_on_where_it_stopped(recovered, tiny, tmp_path, monkeypatch):
    whole = recovered(TRAIN)
    path = tmp_path / "training.pt"
    train = TRAIN | {"checkpoint": str(path), "save_every": 4}
    save = _Checkpoint.save

    def stop(self, *state):
        save(self, *state)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        recovered(train)
    assert len(torch.load(path)["losses"]) == 4
    monkeypatch.setattr(_Checkpoint, "save", save)
    resumed = recovered(train)
    assert all(torch.equal(t, resumed.kept[n]) for n, t in whole.kept.items())
    with pytest.raises(DataError, match="is a checkpoint of other options"):
        recovered(train | {"lr": 1e-3})
    with pytest.raises(DataError, match="is a checkpoint of other options"):
        recovered(train, tiny("llama", seed=1))
    path.write_text("no checkpoint")
    with pytest.raises(DataError, match="is not a checkpoint"):
        recovered(train)
    with pytest.raises(DataError, match="in a folder that does not exist"):
        recovered(train | {"checkpoint": str(tmp_path / "none" / "training.pt")})


def test_quality_is_measured_on_text_that_nothing_trained_on(tiny, tiny_tokenizer, text, monkeypatch):
    """Of one text: what is behind the windows of calibration and of training."""
    pytest.importorskip("peft")
    seen = []
    compare = evaluate.compare
    monkeypatch.setattr(evaluate, "compare", lambda run, ids, *a, **k: seen.append(ids) or compare(run, ids, *a, **k))
    chosen = recipe({"windows": 5, "batch": 5, "rank": 2, "targets": ["*.down_proj"]})
    compress(tiny("llama"), chosen, tokenizer=tiny_tokenizer, data=text)
    every = windows(tiny_tokenizer, text.read_text(), 5 + QUALITY_WINDOWS, 24)
    assert seen and all(torch.equal(ids, every[5:]) for ids in seen)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch": 0}, "batch 0 must be 1 or more"),
        ({"rank": 3}, "rank 3 must be an even number"),
        ({"lr": 0.0}, "lr 0 must be above 0"),
        ({"warmup": 1.0}, "warmup 1 is not a share of the steps"),
    ],
)
def test_options_that_train_nothing_are_refused(option, message):
    with pytest.raises(RecipeError, match=message):
        recipe(option)


def test_without_peft_it_says_what_to_install(tiny, tiny_tokenizer, text, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **more):
        if name == "peft":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RecipeError, match=r"pip install 'compressor\[recover\]'"):
        compress(tiny("llama"), recipe(TRAIN), tokenizer=tiny_tokenizer, data=text, measure=False)
