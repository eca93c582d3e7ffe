"""What a user meets first: import, names in configs, errors at the terminal."""

import subprocess
import sys

import pytest
from conftest import ROOT
from monai.bundle import ConfigParser

import monai_morse
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


@pytest.mark.parametrize("name", monai_morse.__all__)
def test_public_names_are_documented_and_unique_among_monais(name):
    import monai

    assert getattr(monai_morse, name).__doc__
    if name[0].isupper():
        for module in (monai.networks.nets, monai.losses, monai.handlers, monai.engines):
            assert not hasattr(module, name)


def test_import_costs_less_than_two_seconds_beyond_monais():
    code = "import time, monai, monai.bundle\nt = time.perf_counter()\nimport monai_morse\nprint(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert float(done.stdout.split()[-1]) < 2


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
