"""What a user meets first: import, names in configs, errors at the terminal."""

import ast
import configparser
import graphlib
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from monai.bundle import ConfigParser

import monai_morse
from monai_morse.__main__ import main
from monai_morse.bundles import bundle_names, copy_bundle
from monai_morse.config import parse_bool
from monai_morse.errors import find_input_error

UNET = {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
DEF = {"backbone": UNET, "num_experts": 2, "mixture": {"width": 4}, "head": {"width": 4}}


def test_config_finds_morse_by_both_names():
    code = (
        "from monai.bundle import ConfigParser\n"
        "for target in ('Morse', 'monai_morse.networks.Morse'):\n"
        f"    p = ConfigParser({{'imports': ['$import monai_morse'], 'network_def': {{**{DEF!r}, '_target_': target}}}})\n"
        "    net = p.get_parsed_content('network_def')\n"
        "    print(type(net).__module__, type(net).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-4:] == 2 * ["monai_morse.networks.morse", "Morse"], done.stderr


def test_the_readmes_config_resolves_with_import_monai_morse_alone():
    section = (ROOT / "README.md").read_text().split("## In your own config")[1].split("\n## ")[0]
    config = yaml.safe_load("\n".join(line for line in section.splitlines() if line.startswith("    ")))
    code = (
        f"from monai.bundle import ConfigParser\np = ConfigParser({config!r})\n"
        "print(*(type(p.get_parsed_content(name)).__name__ for name in ('network_def', 'loss', 'prepare_batch')))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-3:] == ["Morse", "MorseLoss", "function"], done.stderr


@pytest.mark.parametrize("name", monai_morse.__all__)
def test_public_names_are_documented_and_unique_among_monais(name):
    import monai

    assert getattr(monai_morse, name).__doc__
    if name[0].isupper():
        for module in (monai.networks.nets, monai.losses, monai.handlers, monai.engines):
            assert not hasattr(module, name)


def test_import_needs_no_wing_and_none_of_the_libraries_that_only_some_commands_need():
    """Where they cannot be imported, ``import monai_morse`` does not miss them; MONAI itself takes them if they are there."""
    absent = "matplotlib itk ray tensorboard nibabel pydicom highdicom scipy skimage ignite h5py onnx tqdm fire".split()
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({absent}))\nimport monai_morse, monai_morse.__main__\n"
        "print(*(name.split('.')[1] for name in sys.modules if name.startswith('monai_morse.')))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.splitlines()[-1].split())
    assert "networks" in found and not found & {"prepare", "experiments", "wrap", "visualize"}


# from the foundation up: a room imports those before it, files within one as they like, but in no circle
ROOMS = (
    "errors config networks losses weights engines inferers data words fingerprint cohort metrics visualize handlers paper "
    "prepare experiments wrap bundles demo __main__"
).split()
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "monai_morse").rglob("*.py"))}


def imported(module):
    """The modules of this package that one of them imports, at its top or in a function."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [n if {n, f"{n}.__init__"} & MODULES.keys() else base for n in names]
        else:
            continue
        yield from (n if n in MODULES else f"{n}.__init__" for n in names if n.split(".")[0] == "monai_morse")


def test_no_room_imports_back_up():
    room = {module: module.split(".")[1] for module in MODULES}
    assert {r for r in room.values() if r != "__init__"} == set(ROOMS)
    order = {name: i for i, name in enumerate(ROOMS)} | {"__init__": -1}  # the package's version and public names
    back = [f"{m} imports {i}" for m in MODULES for i in imported(m) if order[room[i]] > order[room[m]] >= 0]
    assert back == []


def test_no_import_goes_in_a_circle():
    graph = {module: set(imported(module)) - {"monai_morse.__init__"} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_the_work_tree_stays_small():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git repository: an unpacked sdist")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) <= 300, "results are tables, one an experiment: python -m monai_morse report RUNS --save NAME.csv.gz"
    assert [str(f) for f in files if f.stat().st_size > 2**20 and f.name != "model.pt"] == []


def pins(name):
    """Package and version of each line of a requirements file."""
    lines = [line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_oldest_and_newest_versions_are_of_the_same_packages_and_setup_cfg_asks_for_the_oldest():
    newest, oldest = pins("requirements.txt"), pins("requirements-oldest.txt")
    assert newest.keys() == oldest.keys()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = dict(line.split(" >= ") for line in config["options"]["install_requires"].split("\n") if line)
    label = {"pydicom": "2.4.4"}  # MONAI Label needs pydicom < 3; the tests write DICOM with what pydicom 3 has
    assert needed == {name: oldest[name] for name in needed} | label


def test_every_package_and_every_file_of_a_bundle_travels(tmp_path):
    """What setup.cfg lists: all packages, and of the bundles what git knows, weights included."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "monai_morse").rglob("__init__.py")}
    assert set(listed) == found | {"monai_morse._bundles"} and len(set(listed)) == len(listed)
    patterns = config["options.package_data"]["monai_morse._bundles"].split()
    travels = {path for pattern in patterns for path in (ROOT / "bundles").glob(pattern) if path.is_file()}
    if (ROOT / ".git").exists() and shutil.which("git"):
        known = subprocess.run(["git", "ls-files", "bundles"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
        assert travels == {ROOT / name for name in known.split()}


@pytest.mark.parametrize("name", bundle_names())
def test_a_bundle_is_copied_whole_and_never_over_another(name, tmp_path, capsys):
    assert main(["bundle", name, "--out", str(tmp_path / "new")]) == 0
    copy, source = tmp_path / "new" / name, ROOT / "bundles" / name
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [name]
    for folder in ("configs", "docs"):
        assert sorted(p.name for p in (copy / folder).iterdir()) == sorted(p.name for p in (source / folder).iterdir())
    assert (copy / "models" / "model.pt").is_file() == (source / "models" / "model.pt").is_file()
    told = capsys.readouterr().out
    assert ("weights: models/model.pt" in told) == (copy / "models" / "model.pt").is_file()
    assert main(["bundle", name, "--out", str(tmp_path / "new")]) == 1
    assert "exists; remove it" in capsys.readouterr().err


def test_a_bundle_that_is_not_there_is_told_with_those_that_are(tmp_path, capsys):
    assert main(["bundle", "liver", "--out", str(tmp_path / "new")]) == 1
    assert "hippocampus_mri_morse" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_bundle_cut_off_while_it_is_copied_is_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError):
        copy_bundle("hippocampus_mri_morse", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == monai_morse.__version__
    assert f"## {monai_morse.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_unknown_word_in_a_config_is_found_behind_monais_wrapping():
    parser = ConfigParser({"network_def": {**DEF, "_target_": "Morse", "experts": "sparse"}})
    with pytest.raises(Exception) as caught:
        parser.get_parsed_content("network_def")
    assert "got 'sparse'" in str(find_input_error(caught.value))


def test_short_errors_print_the_message_alone():
    code = (
        "import monai_morse\nmonai_morse.short_errors()\n"
        "try:\n    monai_morse.parse_bool('maybe', 'resume')\n"
        "except Exception as e:\n    raise RuntimeError('wrapped') from e\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: resume must be true or false, got 'maybe'"
    other = code.replace("monai_morse.parse_bool('maybe', 'resume')", "1 / 0")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", other], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("value, expected", [(True, True), ("true", True), ("False", False), (False, False)])
def test_flags_from_command_lines(value, expected):
    assert parse_bool(value) is expected
