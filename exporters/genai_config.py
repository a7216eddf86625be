"""genai_config.json: what onnxruntime-genai wants to know about model.onnx and how to search.

The model type is always `decoder`, its name for any graph with these inputs and outputs; its names for families stand
for the same code and leave many out. Tokenizer and chat template it reads from the tokenizer files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from compressor.artifact import Artifact

FILE = "genai_config.json"
# Used where neither generation_config.json nor config.json says how long a context may be.
CONTEXT_LENGTH = 2048


def write(artifact: Artifact, graph: ir.Model, folder: Path) -> Path:
    """Write the file of a language model for this graph into `folder`."""
    path = folder / FILE
    path.write_text(json.dumps(describe(artifact, graph), indent=2) + "\n", encoding="utf-8")
    return path


def describe(artifact: Artifact, graph: ir.Model) -> dict[str, Any]:
    """The content of the file. Names and cache sizes are the graph's, tokens and search defaults the model's."""
    config = artifact.config.get_text_config(decoder=True)
    inputs: dict[str, Any] = {str(value.name): value for value in graph.graph.inputs}
    key = inputs["past_key_values.0.key"]
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    context = getattr(config, "max_position_embeddings", None) or CONTEXT_LENGTH
    return {
        "model": {
            "type": "decoder",
            **_tokens(artifact),
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "num_hidden_layers": sum(name.endswith(".key") for name in inputs),
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": key.shape[1],
                "head_size": key.shape[3],
                "inputs": {
                    **names,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": _search(artifact, context, shared=any(n.op_type == "GroupQueryAttention" for n in graph.graph)),
    }


def _asked(artifact: Artifact, name: str, default: Any = None) -> Any:
    """A generation setting of the model: its generation_config first, then its config."""
    for source in (artifact.generation_config, artifact.config, artifact.config.get_text_config(decoder=True)):
        if (value := getattr(source, name, None)) is not None:
            return value
    return default


def _tokens(artifact: Artifact) -> dict[str, Any]:
    """Special tokens. A model without a padding or first token pads and starts with the one that ends its text.

    The file must name them all, and none beyond the vocabulary, whatever the config says: no list entry ends a text
    that has no end token.
    """
    asked = _asked(artifact, "eos_token_id", getattr(artifact.tokenizer, "eos_token_id", None))
    vocabulary = artifact.config.get_text_config(decoder=True).vocab_size
    given = asked if isinstance(asked, list) else [asked]
    ends = [token for token in given if token is not None and token < vocabulary]
    first = ends[0] if ends else 0
    return {
        "bos_token_id": _asked(artifact, "bos_token_id", first),
        "eos_token_id": ends,
        "pad_token_id": _asked(artifact, "pad_token_id", first),
    }


def _search(artifact: Artifact, context: int, shared: bool) -> dict[str, Any]:
    """shared: the cache is one buffer that the graph writes into, instead of being copied for every token."""
    sampling = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    return {
        **{name: _asked(artifact, name, default) for name, default in sampling.items()},
        "num_beams": 1,
        "min_length": 0,
        "max_length": context,
        "past_present_share_buffer": shared,
    }
