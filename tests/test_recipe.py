"""Recipes: what loads, what a wrong one says, and that they print back to themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.methods import METHODS
from compressor.methods.quantize import Quantize
from compressor.recipe import Recipe
from compressor.recipe_yaml import SHIPPED, shipped

GOOD = """\
model: a/b
calibration:
  windows: 8
steps:
  - quantize:
      weights: int4
  - quantize:
      targets: ["*.mlp.*"]
      ignore: ["*.down_proj"]
      weights: nvfp4
      activations: nvfp4
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "r.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def error_of(name: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        Recipe.load(name, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_values_and_defaults(write):
    recipe = Recipe.load(write(GOOD))
    assert (recipe.model, recipe.seed, recipe.runtime) == ("a/b", 0, "transformers")
    assert (recipe.calibration.data, recipe.calibration.windows, recipe.calibration.length) == (None, 8, 512)
    assert (recipe.embedding, recipe.lm_head, recipe.exports) == ("bf16", "bf16", ["safetensors", "onnx"])
    first, second = recipe.steps
    assert first.method == "quantize" and first.targets == ["*"] and first.ignore == []
    assert first.options == Quantize(weights="int4")
    assert second.targets == ["*.mlp.*"] and second.ignore == ["*.down_proj"]
    assert second.options == Quantize(weights="nvfp4", activations="nvfp4")


def test_a_recipe_is_frozen(write):
    recipe = Recipe.load(write(GOOD))
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_load_and_print_back(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe == Recipe.load(f"{name}.yaml") == Recipe.load(SHIPPED / f"{name}.yaml")
    printed = tmp_path / "printed.yaml"
    printed.write_text(recipe.to_yaml())
    again = Recipe.load(printed)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert recipe.model == ("all-minilm-l6-v2" if name == "bert-flashsvd" else "smollm2-135m-instruct")


def test_which_recipes_are_shipped():
    assert set(shipped()) >= {"w4a4", "w4a16", "nvfp4a16", "mxfp4", "w8a8", "fp8"}
    assert all(len(description) > 20 for description in shipped().values())
    weights = {name: getattr(Recipe.load(name).steps[-1].options, "weights", None) for name in shipped()}
    assert weights["w4a4"] == weights["nvfp4a16"] == "nvfp4" and weights["w4a16"] == "int4" and weights["fp8"] == "fp8"
    assert Recipe.load("w4a16").steps[0].options.group_size == 128


def test_printing_fills_in_every_option(write):
    text = Recipe.load(write(GOOD)).to_yaml()
    for word in ("seed: 0", "length: 512", "on_misfit: smaller", "four_over_six: false", "group_size: null"):
        assert word in text


def test_from_dict_equals_the_file(write):
    data = {"seed": 3, "steps": [{"quantize": {"weights": "int8", "activations": "int8"}}]}
    assert Recipe.from_dict(data) == Recipe.load(
        write("seed: 3\nsteps: [{quantize: {weights: int8, activations: int8}}]")
    )
    assert Recipe.from_dict({"extends": "w4a4"}) == Recipe.load("w4a4")
    with pytest.raises(RecipeError, match=r"^recipe, step 1 \(quantize\): unknown option 'weight'"):
        Recipe.from_dict({"steps": [{"quantize": {"weight": "int8"}}]})


def test_exponents_without_a_point_are_numbers(write):
    assert "1e3" not in error_of(write("seed: 1e3\nsteps: [{quantize: }]"))  # read as 1000.0, not as text


# -- extends


def test_extends_merges_mappings_and_replaces_steps(write):
    write(GOOD, "base/b.yaml")
    child = write("extends: base/b\nseed: 5\ncalibration: {length: 64}\nsteps:\n  - quantize: {weights: fp8}\n")
    recipe = Recipe.load(child)
    assert (recipe.model, recipe.seed, recipe.calibration.windows, recipe.calibration.length) == ("a/b", 5, 8, 64)
    assert [step.options.weights for step in recipe.steps] == ["fp8"]


def test_extends_is_relative_to_the_file_then_shipped(write):
    write("extends: ../c.yaml\n", "sub/b.yaml")
    write(GOOD, "c.yaml")
    assert Recipe.load(write("extends: sub/b.yaml\n")).model == "a/b"
    assert Recipe.load(write("extends: w4a4\nseed: 9\n", "w4a4.yaml")).seed == 9  # extends the shipped one, not itself


def test_errors_name_the_file_that_wrote_the_value(write):
    write("model: x\nembedding: int5\nsteps: [{quantize: {weights: int4}}]\n", "b.yaml")
    assert error_of(write("extends: b\nseed: 1\n")).startswith(
        "b.yaml line 2: embedding is 'int5'; did you mean 'int8'?"
    )
    assert error_of(write("extends: b\nseed: 1\nembedding: int6\n")).startswith("r.yaml line 3: embedding is 'int6'")


def test_circles(write):
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert error_of("a.yaml") == "b.yaml line 1: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml."
    assert "circle: me.yaml -> me.yaml" in error_of(write("extends: me.yaml", "me.yaml"))


def test_extends_errors(write):
    assert error_of(write("extends: w4a5")).startswith("r.yaml line 1: no recipe 'w4a5'")
    assert error_of(write("seed: 1\nextends: [a, b]")).startswith("r.yaml line 2: extends is ['a', 'b']")


# -- errors, one sentence each


def test_unknown_recipe(write):
    message = error_of("w4a5.yaml")
    assert "no recipe 'w4a5.yaml'" in message and "did you mean 'w4a4'? Allowed: bert-flashsvd, cfsp-20," in message
    assert "no recipe ''" in error_of("")
    Path("folder.yaml").mkdir()
    assert "no recipe 'folder.yaml'" in error_of("folder.yaml")


CASES = {
    "unknown option": (
        GOOD.replace("ignore:", "ignroe:"),
        "r.yaml line 9, step 2 (quantize): unknown option 'ignroe'; did you mean 'ignore'? Allowed: activations,",
    ),
    "unknown value": (
        GOOD.replace("activations: nvfp4", "activations: nvpf4"),
        "r.yaml line 11, step 2 (quantize): activations is 'nvpf4'; did you mean 'nvfp4'? Allowed: fp8, int8,",
    ),
    "unknown method": (
        "steps:\n  - quantise:\n      weights: int4\n",
        "r.yaml line 2, step 1: unknown method 'quantise'; did you mean 'quantize'? Allowed: cats, cett, cfsp, correct",
    ),
    "illegal combination": (
        "steps:\n  - quantize:\n      weights: nvfp4\n      group_size: 48\n",
        "r.yaml line 4, step 1 (quantize): group_size 48 is not possible with nvfp4",
    ),
    "wrong type": ("seed: one\nsteps: [{quantize: }]\n", "r.yaml line 1: seed is 'one'; allowed: a whole number."),
    "text for a number": (
        'calibration: {windows: "8"}\nsteps: [{quantize: }]\n',
        "r.yaml line 1: calibration.windows is '8'; allowed",
    ),
    "out of range": (
        "calibration:\n  windows: 0\nsteps: [{quantize: }]\n",
        "r.yaml line 2: calibration.windows is 0; allowed: 1 or more.",
    ),
    "option of wrong type": (
        "steps:\n- quantize:\n    sequential: 1\n",
        "r.yaml line 3, step 1 (quantize): sequential is 1; allowed: true or false.",
    ),
    "targets not a list": (
        "steps:\n- quantize:\n    targets: '*'\n",
        "r.yaml line 3, step 1 (quantize): targets is '*'; allowed: a list.",
    ),
    "no targets": (
        "steps:\n- quantize:\n    targets: []\n",
        "r.yaml line 3, step 1 (quantize): targets is []; allowed: at least one item.",
    ),
    "unknown key": ("sede: 1\nsteps: [{quantize: }]\n", "r.yaml line 1: unknown option 'sede'; did you mean 'seed'?"),
    "unknown nested key": (
        "calibration:\n  window: 1\nsteps: [{quantize: }]\n",
        "r.yaml line 2: unknown option 'window'; did you mean 'windows'? Allowed: data, dtype, length, windows.",
    ),
    "a mapping is due": (
        "calibration: 8\nsteps: [{quantize: }]\n",
        "r.yaml line 1: calibration is 8; allowed: a mapping.",
    ),
    "unknown export": (
        "steps: [{quantize: }]\nexports: [onx]\n",
        "r.yaml line 2: exports is 'onx'; did you mean 'onnx'?",
    ),
    "no steps": ("seed: 1\n", "r.yaml: 'steps' is missing"),
    "empty steps": ("seed: 1\nsteps: []\n", "r.yaml line 2: steps is []; allowed: at least one item."),
    "steps not a list": ("seed: 1\nsteps: {quantize: {}}\n", "r.yaml line 2: steps is {"),
    "a step with two methods": ("steps:\n  - quantize:\n    prune:\n", "r.yaml line 2, step 1: is {"),
    "a step that is a word": (
        "steps:\n  - quantize\n",
        "r.yaml line 2, step 1: is 'quantize'; allowed: one method with its options",
    ),
    "runtime and rounding": (
        "steps:\n- quantize:\n    activations: nvfp4\n    four_over_six: true\n",
        "r.yaml line 4, step 1 (quantize): four_over_six is not what transformers computes; set runtime:",
    ),
    "empty": ("", "r.yaml: is empty"),
    "only a comment": ("# nothing\n", "r.yaml: is empty"),
    "a list": ("- a\n", "r.yaml: holds a list; a recipe is a mapping"),
    "a word": ("hello\n", "r.yaml: holds a str; a recipe is a mapping"),
    "duplicate key": (
        "seed: 1\nmodel: a\nseed: 2\n",
        "r.yaml line 3: is not valid YAML: the key 'seed' is there twice, first",
    ),
    "duplicate option": (
        "steps:\n- quantize:\n    weights: int4\n    weights: int8\n",
        "r.yaml line 4: is not valid YAML: the key 'weights' is there twice, first on line 3.",
    ),
    "tab": ("steps:\n\t- quantize:\n", "r.yaml line 2: is not valid YAML: found character '\\t'"),
    "broken": ("steps: [\n", "r.yaml line 2: is not valid YAML:"),
    "colons": ("model: a: b\n", "r.yaml line 1: is not valid YAML: mapping values are not allowed"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "r.yaml line 2: is not valid YAML:"),
    "number as a key": ("1: 2\n", "r.yaml line 1: is not valid YAML: the key '1' is not a plain word."),
    "list as a key": ("[a]: 2\n", "r.yaml line 1: is not valid YAML: a key is not a plain word."),
    "python object": (
        "model: !!python/name:os.system\n",
        "r.yaml line 1: is not valid YAML: could not determine a constructor",
    ),
    "alias in itself": ("model: &a [*a]\n", "r.yaml: is not valid YAML: an alias contains itself."),
    "impossible date": ("model: 2024-99-99\n", "r.yaml: is not valid YAML: month must be"),
    "control character": ("model: \x01\n", "r.yaml: is not valid YAML: "),
}


@pytest.mark.parametrize(("text", "start"), CASES.values(), ids=CASES)
def test_one_sentence(text, start, write):
    message = error_of(write(text))
    assert message.startswith(start)
    assert message.endswith(".")


def test_not_text(write):
    write("").write_bytes(b"\xff\xfe\x00\x80model")
    assert "not UTF-8" in error_of("r.yaml")


# -- overrides


def test_overrides(write):
    path = write(GOOD)
    recipe = Recipe.load(path, ["seed=7", "calibration.windows=2", "embedding=int8", "model=null", "exports=[onnx]"])
    assert (recipe.seed, recipe.calibration.windows, recipe.embedding, recipe.model) == (7, 2, "int8", None)
    assert recipe.exports == ["onnx"]
    assert recipe.calibration.length == 512


def test_override_by_method_and_by_step_number(write):
    path = write(GOOD)
    both = Recipe.load(path, ["quantize.scales=absmax"])
    assert [step.options.scales for step in both.steps] == ["absmax", "absmax"]
    second = Recipe.load(path, ["2.scales=absmax", "1.group_size=64"])
    assert [step.options.scales for step in second.steps] == ["weighted", "absmax"]
    assert second.steps[0].options.group_size == 64
    assert Recipe.load(path, ["1.targets=['*.q_proj']"]).steps[0].targets == ["*.q_proj"]
    assert Recipe.load(write("steps:\n- quantize:\n"), ["1.weights=fp8"]).steps[0].options.weights == "fp8"


def test_the_last_override_wins(write):
    assert Recipe.load(write(GOOD), ["seed=1", "seed=2"]).seed == 2


OVERRIDE_CASES = {
    "quantize.grp_size=64": "--set quantize.grp_size=64, step 1 (quantize): unknown option 'grp_size'; did you mean",
    "2.group_size=48": "--set 2.group_size=48, step 2 (quantize): group_size 48 is not possible with nvfp4",
    "quantise.group_size=64": "--set quantise.group_size=64: the recipe has no 'quantise'; did you mean 'quantize'?",
    "3.group_size=64": "--set 3.group_size=64: the recipe has no '3'; ",
    "embeding=int8": "--set embeding=int8: unknown option 'embeding'; did you mean 'embedding'?",
    "calibration.window=1": "--set calibration.window=1: unknown option 'window'; did you mean 'windows'?",
    "calibration.windows=few": "--set calibration.windows=few: calibration.windows is 'few'; allowed: a whole number.",
    "seed.x=1": '--set seed.x=1: seed is {"x": 1}; allowed: a whole number.',
    "seed": "--set seed: allowed is name=value",
    "=1": "--set =1: allowed is name=value",
    "quantize.=1": "--set quantize.=1: allowed is name=value",
    "1.targets=[*.q]": "--set 1.targets=[*.q]: the value is not valid YAML",
    "extends=w4a4": "--set extends=w4a4: unknown option 'extends'",
}


@pytest.mark.parametrize(("override", "start"), OVERRIDE_CASES.items(), ids=OVERRIDE_CASES)
def test_override_errors(override, start, write):
    assert error_of(write(GOOD), override).startswith(start)


# -- the contract with methods


def test_every_option_of_every_method_can_be_given_by_name(write):
    from dataclasses import MISSING, fields, is_dataclass

    # A budget, in one of several options that default to None; one of three rotations, which are all off.
    required = {"mixed_bits": {"bits": 5.0}, "svd": {"keep": 0.8}, "rotate": {"values": True}}
    for name, method in METHODS.items():
        assert is_dataclass(method) and method.__dataclass_params__.frozen
        given = {f.name: f.default for f in fields(method) if f.default is not MISSING} | required.get(name, {})
        recipe = Recipe.from_dict({"steps": [{name: given}]})
        assert recipe.steps[0].options == method(**given)


def test_allowed_numbers_are_listed():
    assert error_of("llm-fp4", "fp4.bits=5").endswith("bits is 5; Allowed: 4, 6, 8.")
    assert error_of("mxfp4-hadamard", "rotate.inputs=48").endswith("inputs is 48; Allowed: 0, 16, 32, 64.")
