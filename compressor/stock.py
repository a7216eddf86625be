"""The original as other tools ship it, to measure ours against: `python -m compressor.stock JOB SOURCE FOLDER`.

save            the original as a float32 transformers folder
int4, fp32      a language model's graph by onnxruntime-genai's own builder, from such a folder
encoder         an encoder's graph by optimum's own exporter, from such a folder
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError

# The builder of onnxruntime-genai 0.18 imports these by name, for models of those families only. transformers 4,
# which optimum-onnx pins, does not have them: without stand-ins the two could not be installed together.
ONLY_IN_TRANSFORMERS_5 = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")


def save(source: str, folder: Path) -> None:
    """Raises ModelError when the source is not a model that can be loaded."""
    from compressor.model import load_model

    loaded = load_model(source)
    model: Any = loaded.model
    # What was read from a GGUF file is plain float32; transformers 5 takes it for quantized and would not write it.
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.save_pretrained(folder)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("rope_scaling", 0) is None:  # how transformers 4 writes "none"; the builder iterates over it
        config["rope_scaling"] = {"rope_type": "default"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build(precision: str, source: str, folder: Path) -> None:
    """The builder as its own command line runs it, on the CPU."""
    import onnxruntime_genai
    import transformers

    for name in ONLY_IN_TRANSFORMERS_5:
        if not hasattr(transformers, name):
            setattr(transformers, name, type(name, (), {}))
    # It imports its neighbours as top-level modules, which works only when it is run by its path.
    script = Path(onnxruntime_genai.__file__).parent / "models" / "builder.py"
    cache = folder.parent / "builder-cache"
    sys.argv = [str(script), "-m", source, "-o", str(folder), "-p", precision, "-e", "cpu", "-c", str(cache)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def encoder(source: str, folder: Path) -> None:
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    ORTModelForFeatureExtraction.from_pretrained(source, export=True).save_pretrained(folder)


def main(job: str, source: str, folder: str) -> None:
    match job:
        case "save":
            save(source, Path(folder))
        case "encoder":
            encoder(source, Path(folder))
        case precision:
            build(precision, source, Path(folder))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except CompressorError as error:
        sys.exit(str(error))
