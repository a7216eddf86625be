"""The methods a recipe step can name, and what the pipeline asks of each.

A method is a frozen dataclass whose fields are its recipe options. It gives

    needs()                        the statistics it wants from calibration
    place(out_features, in_features) -> Placement      what will happen to a layer, from its shape alone
    plan(layers, calibration) -> {name: plan}          decisions that look at several layers at once
    apply(layer, plan) -> Packed                       one layer, pure: tensors in, Packed out

Adding a method is one file, its test and one line here.
"""

from compressor.methods.mixed_bits import MixedBits
from compressor.methods.quantize import Quantize

METHODS = {"quantize": Quantize, "mixed_bits": MixedBits}
