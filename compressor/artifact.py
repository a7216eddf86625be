"""Everything needed to rebuild, run and export a compressed model without the original weights.

It knows Packed, not methods. `model()` always rebuilds from the stored tensors, so the model that is measured
is the model that is written. Reading and writing folders is `folder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.layers import Packed, QuantEmbedding, build, hold_dense
from compressor.lean import lean as run_lean
from compressor.model import skeleton
from compressor.progress import Progress, Silent
from compressor.recipe import Recipe
from compressor.structure import Structure, reshape


@dataclass
class Artifact:
    config: Any  # transformers.PretrainedConfig
    kind: str  # "causal-lm" | "encoder"
    tokenizer: Any | None
    recipe: Recipe
    packed: dict[str, Packed]  # by module name; all tensors are on the CPU
    kept: dict[str, Tensor]  # by tensor name
    tied: dict[str, str]  # tensor name -> the tensor it is; only the latter is stored
    structure: Structure = field(default_factory=dict)  # where modules have not the shapes of `config`
    record: dict[str, Any] = field(default_factory=dict)  # what the manifest says of the run
    generation_config: Any | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor under its name in the file, each once, sorted by name."""
        names = {f"{module}.{name}": t for module, p in self.packed.items() for name, t in p.tensors.items()}
        names |= self.kept
        return {name: names[name] for name in sorted(names) if name not in self.tied}

    def model(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        dense: bool = False,
        lean: bool | None = None,
        device: str | torch.device = "cpu",
    ) -> nn.Module:
        """A runnable transformers model on the stored tensors, in eval mode; inputs and outputs in `dtype`.

        dense=True holds the dequantized weights (4 bytes each) so that repeated forwards are several times faster;
        the arithmetic is the same. lean: whether linears of low rank run without activations of full width
        (docs/flashsvd.md); None: as the recipe says.
        """
        model = reshape(skeleton(self.config, self.kind, dtype), self.structure)
        for name, packed in self.packed.items():
            module = build(packed)
            if isinstance(module, QuantEmbedding):
                module.output_dtype = dtype
            model.set_submodule(name, module)
        stored = {**self.kept, **{alias: self.kept[name] for alias, name in self.tied.items() if name in self.kept}}
        for name, tensor in stored.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            value = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value
        for alias, name in self.tied.items():
            if name in self.kept:
                owner = model.get_submodule(alias.rpartition(".")[0])
                source = model.get_submodule(name.rpartition(".")[0])
                owner._parameters[alias.rpartition(".")[2]] = source._parameters[name.rpartition(".")[2]]
        missing = [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
        assert not missing, f"tensors without a value: {missing[:5]}"
        model = model.eval()
        if self.recipe.lean if lean is None else lean:
            run_lean(model)
        model = model.to(device)
        return hold_dense(model) if dense else model

    def save(self, folder: str | Path, *, force: bool = False, progress: Progress = Silent()) -> Path:
        """Write the folder of this artifact; it appears complete or not at all. Raises OutputError."""
        from compressor.folder import write

        return write(self, Path(folder), force=force, progress=progress)
