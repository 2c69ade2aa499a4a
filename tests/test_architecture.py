"""The laws of the code, read from the source with ast: who may import whom, who owns which library, how large a file may be.

Nothing here runs the package; a violation is named with its file and line.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_tree import ROOT, SHIPPED, Source, body_lines, dotted, import_cycles, sources

ORDER = (
    "hf errors files command lease rng diffusion config cost planner attention data compat parallel process model engine "
    "checkpoint sampling convert evaluate train report cli"
).split()
"""A package imports only from packages to its left."""

OWNERS = {
    "deepspeed": {"compat", "engine", "checkpoint"},
    "megatron": {"compat", "parallel", "model", "engine"},
    "sentencepiece": {"data"},
    "datasets": {"data"},
    "transformers": {"data", "hf", "sampling", "convert", "evaluate"},
    "lm_eval": {"evaluate"},
    "apex": {"compat"},
    "transformer_engine": {"compat"},
    "flash_attn": {"compat"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
}
"""Foreign engines and the packages that may import them."""

WANDB_FILES = {"bd3_megatron/train/loggers.py"}
SEED_FILES = {"bd3_megatron/rng.py"}
SEEDS = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed"}
SEEDS |= {"numpy.random.seed", "random.seed"}

TOP_LEVEL = {"bd3_megatron", "launch", "configs", "tools", "tests", "setup.py", "README.md", "LICENSE"}
FILE_LINES = 500
FUNCTION_LINES = 60
POSITIONAL_ARGUMENTS = 5
FOREIGN_SIGNATURES = {"forward", "backward", "named_parameters", "state_dict", "load_state_dict", "makedirs"}
FOREIGN_SIGNATURES |= {"loglikelihood", "loglikelihood_rolling", "generate_until"}
"""Methods whose signature torch, DeepSpeed or lm-evaluation-harness chose."""
CUDA_ELSEWHERE = {
    # attention stands left of compat and may not ask it; which kernel is fastest depends on the device's capability
    "bd3_megatron/attention/machine.py",
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "misc", "common"}
UNFINISHED = ("TODO", "FIXME", "XXX", "NotImplementedError")


@pytest.fixture(scope="module")
def package() -> tuple[Source, ...]:
    return sources("bd3_megatron")


@pytest.fixture(scope="module")
def shipped() -> tuple[Source, ...]:
    """Everything users run."""
    return sources(*SHIPPED)


@pytest.fixture(scope="module")
def everything() -> tuple[Source, ...]:
    return sources(*SHIPPED, "tests")


def imports(source: Source) -> Iterator[tuple[str, int, int]]:
    """(module, relative level, line) of every import, also inside functions; names of packages are taken as modules."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            # `from bd3_megatron import data` imports a package as much as `import bd3_megatron.data`
            names = [f"{base}.{a.name}" for a in node.names] if base == "bd3_megatron" else [base]
            yield from ((name, node.level, node.lineno) for name in names)


def package_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "bd3_megatron" and len(parts) > 1 and parts[1] != "__version__" else None


def test_every_package_has_its_position_in_the_order(package: tuple[Source, ...]) -> None:
    names = {s.package for s in package} - {"__init__"}
    assert names <= set(ORDER), f"packages without a position: {names - set(ORDER)}"


def test_a_package_imports_only_from_packages_to_its_left(package: tuple[Source, ...]) -> None:
    wrong = []
    for source in package:
        if source.package == "__init__":
            continue
        allowed = set(ORDER[: ORDER.index(source.package) + 1])
        for module, _, line in imports(source):
            target = package_of(module)
            if target is not None and target not in allowed:
                wrong.append(f"{source.path}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle_between_files(everything: tuple[Source, ...]) -> None:
    cycles = import_cycles(everything)
    assert not cycles, "files that import each other, late and TYPE_CHECKING imports included:\n" + "\n".join(
        " <-> ".join(cycle) for cycle in cycles
    )


def test_hf_travels_alone_and_the_others_name_full_paths(package: tuple[Source, ...]) -> None:
    wrong = []
    for source in package:
        for module, level, line in imports(source):
            inside_hf = source.package == "hf"
            if (inside_hf and (module.startswith("bd3_megatron") or level > 1)) or (not inside_hf and level > 0):
                wrong.append(f"{source.path}:{line} imports {'.' * level}{module}")
    assert not wrong, "\n".join(wrong)


def test_launch_imports_errors_files_config_and_costs_only_and_no_torch() -> None:
    wrong = []
    allowed = (
        "bd3_megatron.errors",
        "bd3_megatron.files",
        "bd3_megatron.command",
        "bd3_megatron.config.",
        "bd3_megatron.cost.",
        "bd3_megatron.planner.",
    )
    heavy = {"torch", "numpy", "megatron", "deepspeed", "transformers", "datasets", "wandb"}
    for source in sources("launch"):
        for module, _, line in imports(source):
            outside = module.startswith("bd3_megatron.") and not module.startswith(allowed)
            if outside or module.split(".")[0] in heavy:
                wrong.append(f"{source.path}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_knows_the_launchers(package: tuple[Source, ...]) -> None:
    wrong = [
        f"{s.path}:{line}"
        for s in package
        for module, _, line in imports(s)
        if module.split(".")[0] == "launch" and s.package != "cli"
    ]
    assert not wrong, wrong


def test_foreign_engines_are_imported_by_their_owners_only(package: tuple[Source, ...]) -> None:
    wrong = []
    for source in package:
        for module, level, line in imports(source):
            library = module.split(".")[0] if level == 0 else ""
            owners = OWNERS.get(library)
            if owners is not None and source.package not in owners:
                wrong.append(f"{source.path}:{line} imports {module}; owners are {sorted(owners)}")
            if library == "wandb" and source.path not in WANDB_FILES:
                wrong.append(f"{source.path}:{line} imports wandb; its owner is {WANDB_FILES}")
    assert not wrong, "\n".join(wrong)


def test_init_files_hold_a_docstring_and_import_nothing(everything: tuple[Source, ...]) -> None:
    wrong = []
    for source in everything:
        if not source.path.endswith("__init__.py"):
            continue
        rest = source.tree.body[1:] if ast.get_docstring(source.tree) else source.tree.body
        version = source.path == "bd3_megatron/__init__.py"
        if any(not (version and isinstance(n, ast.Assign)) for n in rest):
            wrong.append(source.path)
    assert not wrong, wrong


def test_every_package_folder_has_an_init_file() -> None:
    folders = {p.parent for p in (ROOT / "bd3_megatron").rglob("*.py")}
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()]
    assert not missing, missing


def test_every_file_says_first_what_it_decides(everything: tuple[Source, ...]) -> None:
    silent = [s.path for s in everything if not ast.get_docstring(s.tree)]
    assert not silent, silent


def test_files_stay_small(everything: tuple[Source, ...]) -> None:
    large = {s.path: s.text.count("\n") for s in everything if s.text.count("\n") > FILE_LINES}
    assert not large, large


def test_functions_stay_small(everything: tuple[Source, ...]) -> None:
    large = []
    for source in everything:
        for function in source.functions:
            if body_lines(function) > FUNCTION_LINES:
                large.append(f"{source.path}:{function.lineno} {function.name} has {body_lines(function)} lines")
    assert not large, "\n".join(large)


def test_public_functions_take_few_positional_arguments_and_no_bare_booleans(shipped: tuple[Source, ...]) -> None:
    wrong = []
    for source in shipped:
        for function in source.functions:
            arguments = [a for a in (*function.args.posonlyargs, *function.args.args) if a.arg not in ("self", "cls")]
            # a GPU kernel takes pointers and strides one by one: Triton knows no structures
            is_kernel = any(
                dotted(d.func if isinstance(d, ast.Call) else d) == "triton.jit" for d in function.decorator_list
            )
            if is_kernel or function.name.startswith("_") or function.name in FOREIGN_SIGNATURES:
                continue
            if len(arguments) > POSITIONAL_ARGUMENTS:
                wrong.append(
                    f"{source.path}:{function.lineno} {function.name} takes {len(arguments)} positional arguments"
                )
            booleans = [a.arg for a in arguments if isinstance(a.annotation, ast.Name) and a.annotation.id == "bool"]
            if booleans:
                wrong.append(f"{source.path}:{function.lineno} {function.name} takes positional booleans {booleans}")
    assert not wrong, "\n".join(wrong)


def test_no_globals(everything: tuple[Source, ...]) -> None:
    found = [f"{s.path}:{n.lineno}" for s in everything for n in s.nodes if isinstance(n, ast.Global)]
    assert not found, found


def test_randomness_has_one_source(shipped: tuple[Source, ...]) -> None:
    found = [
        f"{s.path}:{n.lineno} {dotted(n)}"
        for s in shipped
        if s.path not in SEED_FILES
        for n in s.nodes
        if isinstance(n, ast.Attribute) and dotted(n) in SEEDS
    ]
    assert not found, found


def test_cuda_is_spoken_of_in_compat_only(package: tuple[Source, ...]) -> None:
    found = [
        f"{s.path}:{n.lineno}"
        for s in [*package, *sources("launch")]
        if s.package != "compat" and s.path not in CUDA_ELSEWHERE
        for n in s.nodes
        if isinstance(n, ast.Attribute) and dotted(n) == "torch.cuda"
    ]
    assert not found, found


def replaces_a_file(call: ast.Call) -> bool:
    """os.replace, Path.rename, Path.replace (one argument: a string's takes two, dataclasses' keywords) and their like."""
    name = dotted(call.func)
    if name in {"os.replace", "os.rename", "os.renames", "os.fsync", "shutil.move"}:
        return True
    if not isinstance(call.func, ast.Attribute):
        return False
    writes = call.func.attr in {"rename", "write_text", "write_bytes"}
    return writes or (call.func.attr == "replace" and len(call.args) == 1 and not call.keywords)


def test_files_are_written_and_renamed_in_one_file(shipped: tuple[Source, ...]) -> None:
    found = [
        f"{s.path}:{n.lineno} {dotted(n.func)}"
        for s in shipped
        if s.path != "bd3_megatron/files.py"
        for n in s.nodes
        if isinstance(n, ast.Call) and replaces_a_file(n)
    ]
    assert not found, "bd3_megatron/files.py does this: " + ", ".join(found)


def test_nothing_is_left_unfinished(shipped: tuple[Source, ...]) -> None:
    found = [f"{s.path}: {word}" for s in shipped for word in UNFINISHED if word in s.text]
    assert not found, found


def test_no_file_for_everything(everything: tuple[Source, ...]) -> None:
    found = [s.path for s in everything if Path(s.path).stem in FORBIDDEN_NAMES]
    assert not found, found


def test_the_top_level_is_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the tree cannot be told from what was built in it")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    excess = {name for name in names if name not in TOP_LEVEL and not name.startswith(".")}
    assert not excess, excess


def test_every_folder_of_unit_tests_mirrors_a_package() -> None:
    names = {p.name for p in (ROOT / "tests/unit").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert names <= {*ORDER, "launch", "tools", "core"}, names - set(ORDER)


def test_every_imported_name_of_ours_exists(everything: list[Source]) -> None:
    """An import of a name that was renamed breaks at collection, late, and takes half of the suite with it."""
    defined_in = {s.module: _defined(s) for s in everything}
    wrong = []
    for source in everything:
        for node in source.nodes:
            ours = (
                isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in TOP_LEVEL
            )
            if not ours or not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                is_defined = alias.name in defined_in.get(node.module, set())
                if not is_defined and f"{node.module}.{alias.name}" not in defined_in:
                    wrong.append(f"{source.path}:{node.lineno} imports {alias.name} from {node.module}")
    assert not wrong, "\n".join(wrong)


def _defined(source: Source) -> set[str]:
    """Names that a module binds at its top, conditionally or not."""
    names: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


KIND = re.compile(r"(?:.*_)?(?:kind|objective|layout|form|denominator)")
KIND_OWNERS = {"launch/cluster.py": "the container, as questions with names"}
"""The file that may compare a kind with a text, and whose kind it is; everybody else asks the owner or a table."""


def test_only_its_owner_compares_a_kind_with_a_text() -> None:
    found: dict[str, list[int]] = {}
    for source in sources(*SHIPPED):
        for node in source.nodes:
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                texts = [
                    n
                    for side in sides
                    for n in _items(side)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                if texts and any(KIND.fullmatch(dotted(side).rpartition(".")[2]) for side in sides):
                    found.setdefault(source.path, []).append(node.lineno)
    assert set(found) == set(KIND_OWNERS), {path: found.get(path) for path in set(found) ^ set(KIND_OWNERS)}


def _items(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
