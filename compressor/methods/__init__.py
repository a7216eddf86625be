"""The methods a recipe step can name, and what the pipeline asks of each.

A method is a frozen dataclass whose fields are its recipe options. One that stores layers gives

    place(out_features, in_features) -> Placement      what will happen to a layer, from its shape alone
    survey_needs()                                     statistics for decisions over the whole model, often none
    survey(layers, calibration, fisher) -> decisions   guards, bits: anything with a report() for the manifest
    place_all(shapes, tables) -> {name: Placement}     only of a method that shares a budget out; its survey takes the
                                                       tables too, and its decisions have table_formats
    needs()                                            the statistics of one block's inputs
    plan(layers, calibration, decisions) -> {name: plan}   what the layers of one block share
    apply(layer, plan) -> Packed                       one layer, pure: tensors in, Packed out

A transform rewrites the model into one that computes the same and is easier to store (methods/transform.py):

    fold_needs(), fold(model, calibration) -> report

A structural step puts modules of other shapes in place of linears, before anything is stored (methods/structural.py):

    outline(model, names)                              the shapes that its budget implies, on a model without values
    sensitivity, survey_needs(), survey(…)             as above, but survey looks at one block at a time
    decide(looked, shapes, fisher) -> decisions        of the surveys of all blocks
    search(model, names, decisions, run, generator) -> decisions    only of one that tries them out on the model
    needs(), reshape(model, calibration, decisions) -> report
    or rewrite(model, names, run) -> report            of one that runs the model itself

A method that amends what earlier steps stored (methods/correct.py):

    extra_bytes(out_features, in_features)             what it adds to a layer, from its shape
    sensitivity, survey_needs(), survey(…), decide(…)  as of a structural step; survey gets what is packed too
    needs(), amend(layers, calibration, packed, decisions) -> ({name: Packed}, report)

A method can store and transform: then `fold` sees all windows and returns decisions, and the rest works on the folded
model.

Adding a method is one file, its test and one line here.
"""

from compressor.methods.cats import CATS
from compressor.methods.cett import CETT
from compressor.methods.cfsp import CFSP
from compressor.methods.correct import Correct
from compressor.methods.depth import Depth
from compressor.methods.experts import Experts
from compressor.methods.fp4 import FP4
from compressor.methods.mixed_bits import MixedBits
from compressor.methods.moeify import Moeify
from compressor.methods.odp import ODP
from compressor.methods.otp import OTP
from compressor.methods.outlier_tune import OutlierTune
from compressor.methods.pmq import PMQ
from compressor.methods.quantize import Quantize
from compressor.methods.r_sparse import RSparse
from compressor.methods.recover import Recover
from compressor.methods.rotate import Rotate
from compressor.methods.smooth import Smooth
from compressor.methods.svd import SVD

METHODS = {
    "quantize": Quantize,
    "mixed_bits": MixedBits,
    "pmq": PMQ,
    "outlier_tune": OutlierTune,
    "fp4": FP4,
    "correct": Correct,
    "rotate": Rotate,
    "smooth": Smooth,
    "svd": SVD,
    "r_sparse": RSparse,
    "cats": CATS,
    "cett": CETT,
    "cfsp": CFSP,
    "depth": Depth,
    "experts": Experts,
    "moeify": Moeify,
    "odp": ODP,
    "otp": OTP,
    "recover": Recover,
}
