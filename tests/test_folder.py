"""The folder: complete or absent, the same bytes twice, the same model back, damage named."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch

from compressor import Recipe, compress, load
from compressor.errors import ModelError, OutputError
from compressor.exporters import registry
from compressor.folder import coverage, is_artifact, read_manifest

IDS = torch.arange(4, 40)[None]


@pytest.fixture(scope="module")
def artifact(tiny, tiny_tokenizer):
    recipe = Recipe.load("w4a4", ["calibration.windows=2", "calibration.length=24", "exports=[safetensors]"])
    return compress(tiny("llama", tie_word_embeddings=True), recipe, tokenizer=tiny_tokenizer)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_what_is_loaded_is_what_was_saved(artifact, tmp_path):
    folder = artifact.save(tmp_path / "out")
    again = load(folder)
    assert is_artifact(folder) and again.recipe == artifact.recipe and again.tied == artifact.tied
    assert set(again.packed) == set(artifact.packed)
    for name, tensor in artifact.tensors().items():
        found = again.tensors()[name]
        assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    with torch.inference_mode():
        assert torch.equal(again.model()(IDS).logits, artifact.model()(IDS).logits)
    assert again.tokenizer("some text")["input_ids"] == artifact.tokenizer("some text")["input_ids"]


def test_a_loaded_artifact_saves_the_same_bytes(artifact, tmp_path):
    first = digest(artifact.save(tmp_path / "a"))
    assert digest(artifact.save(tmp_path / "b")) == first
    second = digest(load(tmp_path / "a").save(tmp_path / "c"))
    assert second["model.safetensors"] == first["model.safetensors"]
    assert second["config.json"] == first["config.json"]


def test_the_manifest_accounts_for_every_tensor_and_file(artifact, tmp_path):
    folder = artifact.save(tmp_path / "out")
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["tensors"]) == set(artifact.tensors())
    assert manifest["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert manifest["coverage"]["share"] == pytest.approx(
        coverage(artifact)["compressed_parameters"] / manifest["coverage"]["parameters"], abs=1e-4
    )
    assert 4.5 <= manifest["coverage"]["bits_per_compressed_weight"] < 4.6
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_an_existing_folder_needs_force_and_only_ours_is_replaced(artifact, tmp_path):
    folder = artifact.save(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"):
        artifact.save(folder)
    artifact.save(folder, force=True)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not a folder that compressor wrote"):
        artifact.save(other, force=True)
    assert (other / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "no space"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("bug"), ValueError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_nothing_or_what_was_there(artifact, tmp_path, monkeypatch, error, raised, existing):
    folder = tmp_path / "out"
    before = digest(artifact.save(folder)) if existing else None

    def fails(artifact, partial):
        (partial / "half").write_text("written")
        raise error

    monkeypatch.setitem(registry.EXPORTERS, "safetensors", fails)
    with pytest.raises(raised):
        artifact.save(folder, force=True)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or digest(folder) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda f: (f / "model.safetensors").unlink(), "missing"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "truncated"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}})),
            "compressor",
        ),
    ],
)
def test_damage_is_one_sentence(artifact, tmp_path, damage, message):
    folder = artifact.save(tmp_path / "out")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)
