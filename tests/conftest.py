"""What every test may use: tiny seeded models of each family, a tokenizer made here, folders of both, shared data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; triton reads it when it is imported

VOCABULARY = 288
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# Divisible by 32 for every block format; 96 is not divisible by 64, so that a group of 64 or 128 misfits.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
HEADED = {**GROUPED, "head_dim": 16}
# Family -> (config class, its arguments).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADED),
    "gemma": ("GemmaConfig", HEADED),
    "gemma2": ("Gemma2Config", HEADED | {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", HEADED | {"sliding_window": 16, "sliding_window_pattern": 2}),
    "phi": ("PhiConfig", COMMON | {"intermediate_size": 96}),
    "phi3": ("Phi3Config", GROUPED),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": 96}),
    "gpt2": ("GPT2Config", COMMON | {"n_inner": 96}),
    "bert": ("BertConfig", COMMON | {"intermediate_size": 96}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
# The same of experts; families of one router behave alike and are not repeated in tests of everything.
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = COMMON | {
    "intermediate_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_group": 4, "topk_group": 2,
}  # fmt: skip
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", GROUPED | ROUTED | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", HEADED | ROUTED | {"norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", GROUPED | {"num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2Config", LATENT | {"topk_method": "group_limited_greedy", "num_key_value_heads": 4}),
    "deepseek_v3": ("DeepseekV3Config", LATENT | {"num_key_value_heads": 4}),
    "gpt_oss": ("GptOssConfig", HEADED | LOCAL),
    "granitemoe": ("GraniteMoeConfig", GROUPED | LOCAL),
}
PROSE = (
    "The quick brown fox jumps over the lazy dog. A model that has been compressed should still say what it said "
    "before, and where it does not, somebody should be told. Numbers such as 3.14, 42 and 2048 occur; so do names.\n"
) * 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs once for each."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(CONFIGS))


def make(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A fp32 model in eval mode with weights drawn from `seed`; biases and norms are not left at 0 and 1."""
    import transformers

    name, arguments = (CONFIGS | MIXTURES)[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, name)(**(arguments | changes))
        auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
        model = auto.from_config(config).float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
    config.architectures = [type(model).__name__]
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., torch.nn.Module]:
    """tiny(family, seed=0, **config changes): a fresh tiny model, the same for the same arguments."""
    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE trained on PROSE; its ids stay below the tiny models' vocabulary size, 288."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **SPECIAL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """tiny_folder(family): the tiny model and tokenizer as a Hugging Face folder, written once; read it only."""
    folders: dict[str, Path] = {}

    def folder(family: str = "llama") -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp("models") / family
            make(family).save_pretrained(folders[family])
            tiny_tokenizer.save_pretrained(folders[family])
        return folders[family]

    return folder


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops compute what their references say, bit for bit, also where the library of fused ops is built."""
    from compressor.kernels import native

    monkeypatch.setattr(native, "built", lambda: False)


@pytest.fixture(scope="session")
def prose() -> str:
    """Text enough for a few windows of the tiny models."""
    return PROSE


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of the same text, several times over: calibration text of a pipeline's test."""
    path = tmp_path / "text.txt"
    path.write_text(PROSE * 6)
    return path


@pytest.fixture(scope="session")
def shared_path() -> Callable[..., Path]:
    """shared_path("data", "wikitext2", "test.txt"): a path below ../shared, or a skip where that is not there."""

    def path(*parts: str) -> Path:
        found = Path(__file__).resolve().parents[2].joinpath("shared", *parts)
        if not found.exists():
            pytest.skip(f"shared/{'/'.join(parts)} is not beside this checkout")
        return found

    return path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """register_transformers() for one test: others want the refusal."""
    from transformers.quantizers import auto

    from compressor import register_transformers

    for mapping in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        monkeypatch.setattr(auto, mapping, dict(getattr(auto, mapping)))
    register_transformers()
    register_transformers()  # a second call changes nothing
