"""Who may import whom: the algorithm knows no files, a method no storage, a kernel no method."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ptq161"

# Module or subpackage -> what of ours it may import, anywhere in it. `errors` is free to all.
ALLOWED = {
    # the algorithm: tensors in, tensors out
    "errors": "",
    "config": "",
    "ranks": "",
    "machine": "ranks",
    "arithmetic": "machine config",
    "binarize": "config",
    "packing": "binarize",
    "layout": "packing binarize",
    "budget": "layout packing binarize config",
    "latent": "kernels binarize",
    "mixed": "latent kernels binarize",
    "compensation": "mixed latent binarize",
    "allocation": "budget layout packing binarize config",
    "space": "",
    "blocks": "ranks space",
    "discovery": "blocks budget space",
    "dense": "discovery",
    "draws": "",
    "sensitivity": "draws ranks arithmetic dense discovery blocks space mixed binarize budget",
    "fit": "ranks arithmetic latent blocks binarize config",
    "methods": "fit compensation mixed latent blocks binarize machine config",  # never linear, never kernels
    "walk": "ranks arithmetic methods fit latent sensitivity allocation dense discovery blocks space budget layout "
    "packing binarize config",
    "baselines": "methods dense discovery blocks space",
    "gguf_export": "",
    "llamacpp": "gguf_export blocks discovery config",
    "student": "arithmetic fit latent config",
    "passes": "ranks",
    "allocator": "",
    "causal": "",
    "distill": "ranks arithmetic causal passes student fit config",
    # running packed models
    "kernels": "packing binarize",
    "linear": "kernels layout packing binarize",
    "embedding": "linear kernels layout packing binarize",
    "attention": "",
    "head": "kernels packing binarize",
    "vocabulary": "embedding head linear layout packing binarize",
    # files
    "folder": "",
    "foreign": "",
    "contents": "folder layout packing",
    "verify": "foreign folder layout packing",
    "saving": "contents folder layout packing",
    "hf": "attention saving verify vocabulary contents foreign folder linear kernels layout packing machine config",
    "checkpoint": "ranks dense blocks space latent layout binarize",
    # text and models from outside
    "hub": "",
    "selftext": "draws",
    "data": "hub selftext config",
    "sources": "dense contents hf foreign hub config",
    # commands
    "evaluate": "ranks data hf linear kernels packing binarize machine baselines discovery blocks foreign hub",
    "generation": "data",
    "chat": "generation",
    "handlers": "chat generation data",
    "serve": "handlers",
    "adapters": "binarize",
    "restoration": "ranks arithmetic adapters distill fit checkpoint binarize config",
    "first_quantization": "pipeline walk sources verify hf linear packing binarize dense folder config",
    "before_after": "ranks adapters evaluate checkpoint",
    "preprocess": "ranks first_quantization pipeline restoration adapters before_after walk records sources data hf "
    "dense discovery checkpoint folder config machine",
    "inspection": "sources hf vocabulary saving contents foreign folder discovery blocks allocation layout packing "
    "config",
    "tuning": "ranks arithmetic allocator distill student walk dense discovery blocks checkpoint machine selftext "
    "config",
    "preflight": "methods tuning walk config",
    "records": "ranks walk folder config",
    "blockwise": "ranks walk records checkpoint space layout config",
    "pipeline": "ranks blockwise causal walk tuning preflight records methods dense space checkpoint hf vocabulary "
    "inspection sources data layout config machine",
    "autoround": "methods discovery",
    "contenders": "llamacpp autoround pipeline baselines methods inspection hf dense folder config",
    "comparison_inputs": "contenders records checkpoint sources data config",
    "compare": "comparison_inputs contenders evaluate checkpoint data machine",
    "report": "",
    "shapes": "inspection allocation discovery methods config",
    "options": "config",
    "arguments": "options config",
    "terminal": "",
    "meters": "terminal walk machine",
    "dialogue": "terminal",
    "tables": "terminal",
}
# Anything, inside the bodies; above them only what is light.
PEOPLE_FACING = {"__init__", "__main__", "cli", "commands"}
LIGHT = {"config", "options", "arguments", "commands", "cli"}

THIRD_PARTY = {
    "errors": "",
    "config": "",
    "options": "",
    "arguments": "",
    "foreign": "",
    "layout": "",
    "budget": "",
    "ranks": "torch",
    "machine": "torch",
    "binarize": "torch jaxtyping",
    "adapters": "torch jaxtyping",
    "packing": "torch jaxtyping",
    "fit": "torch jaxtyping",
    "passes": "torch jaxtyping",
    "draws": "torch jaxtyping",
    "methods": "torch jaxtyping",
    "kernels": "torch jaxtyping triton",
    "linear": "torch jaxtyping",
    "embedding": "torch jaxtyping",
    "space": "torch",
    "blocks": "torch jaxtyping",
    "discovery": "torch jaxtyping transformers",
    "walk": "torch jaxtyping transformers",
    "baselines": "torch jaxtyping transformers",
}


def modules():
    """(subpackage or module, file) for every file of the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield parts[0], path


def imported(nodes):
    """Dotted names of all that these syntax nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ([f"ptq161.{a.name}" for a in node.names] if node.module == "ptq161" else [node.module])


MODULES = list(modules())


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[str(path.relative_to(SOURCE)) for _, path in MODULES])
def test_module_imports_only_what_the_table_allows(name, path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = list(imported(tree.body if name in PEOPLE_FACING else ast.walk(tree)))
    assert name in ALLOWED.keys() | PEOPLE_FACING, f"{name} is new: add it to the table, with what it may import"
    ours = {imported_name.split(".")[1] for imported_name in names if imported_name.startswith("ptq161.")}
    allowed = LIGHT if name in PEOPLE_FACING else set(ALLOWED[name].split())
    assert ours <= allowed | {"errors", "__version__", name}, f"{name} may not import {sorted(ours - allowed)}"
    if name in THIRD_PARTY:
        theirs = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"ptq161"}
        assert theirs <= set(THIRD_PARTY[name].split()), f"{name} may not import {sorted(theirs)}"


def test_the_table_has_no_circle():
    """Modules can be put in an order in which each imports only earlier ones."""
    left = {name: set(allowed.split()) for name, allowed in ALLOWED.items()}
    while left:
        ready = {name for name, needs in left.items() if not needs & left.keys()}
        assert ready, f"circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in ready}


def modules_loaded_by(code):
    """Top-level names in sys.modules after `code`, in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('LOADED', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        check=True,
    )
    return set(done.stdout.rpartition("LOADED")[2].split())


HEAVY = {"torch", "transformers", "datasets", "safetensors", "numpy"}


def test_importing_the_package_is_light():
    assert not modules_loaded_by("import ptq161; ptq161.__version__; dir(ptq161)") & HEAVY


def test_settings_and_errors_are_light():
    assert not modules_loaded_by("from ptq161 import QuantConfig, CheckpointError; QuantConfig()") & HEAVY


def test_help_is_light():
    code = """
import sys
from ptq161.cli import main
for arguments in (["--help"], ["quantize", "--help"], ["--version"]):
    sys.argv = ["ptq161", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
    assert not modules_loaded_by(code) & HEAVY


def test_public_names_resolve():
    code = """
import ptq161
assert set(ptq161.__all__) <= set(dir(ptq161))
missing = [name for name in ptq161.__all__ if getattr(ptq161, name, None) is None]
assert not missing, missing
assert callable(ptq161.quantize) and callable(ptq161.inspect) and callable(ptq161.load)
"""
    assert "torch" in modules_loaded_by(code)


def test_unknown_public_name_is_an_attribute_error():
    import ptq161

    with pytest.raises(AttributeError, match="quantise"):
        ptq161.quantise  # noqa: B018
