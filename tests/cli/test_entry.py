import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

import kappa_lightning
from kappa_lightning.cli import commands, main, registry

HELLO = """
from kappa_lightning.cli.command import Command

def add_arguments(parser):
    parser.add_argument("--name", default="you")

def run(args):
    if args.name == "nobody":
        raise ValueError("nobody is there\\nerror: \\x1b[31mforged")
    if args.name == "crowd":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    if args.name == "fault":
        raise RuntimeError("a fault")
    if args.name == "key":
        raise KeyboardInterrupt
    print(f"hello {args.name}")
    return 3

COMMAND = Command("greet", "Greets.", "kappa-lightning say-hello --name x", add_arguments, run, lambda args: True)
"""


@pytest.fixture
def hello(tmp_path, monkeypatch):
    """A further command, by one further file."""
    (tmp_path / "say_hello.py").write_text(HELLO)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    yield
    sys.modules.pop("kappa_lightning.cli.commands.say_hello", None)


@pytest.mark.usefixtures("hello")
def test_a_file_in_the_folder_is_a_command(capsys):
    assert "say-hello" in registry.names()
    assert main(["say-hello", "--name", "me"]) == 3
    assert capsys.readouterr().out == "hello me\n"


@pytest.mark.usefixtures("hello")
def test_help_lists_all_commands_with_an_example_each(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    examples = text[text.index("examples:") :]
    for name in registry.names():
        assert re.search(rf"^    {name}\s", text, re.M)
        assert f"\n  kappa-lightning {name}" in examples


@pytest.mark.parametrize("name", registry.names())
def test_every_command_explains_itself_and_its_example_is_one(name, capsys):
    loaded = registry.load(name)
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert loaded.example in capsys.readouterr().out
    assert loaded.example.startswith(f"kappa-lightning {name}")
    assert not loaded.summary.endswith(".")


def test_of_one_command_no_other_is_imported(hello, capsys):
    main(["say-hello"])
    code = "import sys\nfrom kappa_lightning.cli import main\nmain(['scan', 'none'])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("kappa_lightning.cli.commands.")}
    assert loaded == {"kappa_lightning.cli.commands.scan"}
    assert "matplotlib" not in done.stdout.split()


@pytest.mark.usefixtures("hello")
def test_error_is_one_line_whatever_is_in_its_message(capsys):
    assert main(["say-hello", "--name", "nobody"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "kappa-lightning: error: nobody is there error: \\x1b[31mforged\n"


@pytest.mark.usefixtures("hello")
def test_lack_of_memory_on_a_cpu_is_one_line_too_and_a_fault_is_not_hidden(capsys):
    assert main(["say-hello", "--name", "crowd"]) == 1
    assert capsys.readouterr().err.startswith("kappa-lightning: error: out of memory (")
    with pytest.raises(RuntimeError, match="a fault"):
        main(["say-hello", "--name", "fault"])


@pytest.mark.usefixtures("hello")
def test_interrupted_command_that_can_go_on_says_so(capsys):
    assert main(["say-hello", "--name", "key"]) == 130
    assert capsys.readouterr().err == "kappa-lightning: interrupted; the same command goes on from there\n"


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kappa-lightning {kappa_lightning.__version__}\n"


def test_bash_completes_commands_and_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    # Asks bash itself what `kappa-lightning sc` and `kappa-lightning scan --fi` could become.
    question = textwrap.dedent(
        """
        ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); "$function"; echo "${COMPREPLY[@]}"; }
        function=$(complete -p kappa-lightning | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        ask kappa-lightning sc
        ask kappa-lightning scan --fi
        """
    )
    done = subprocess.run(["bash", "-c", script + question], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["scan", "--figure"]


# The streams of a process


@pytest.fixture
def checkpoint(tmp_path):
    state = {"b.weight": torch.diag(torch.tensor([3.0, 1.0])), "größe.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def shell(line, checkpoint, **env):
    command = line.replace("SCAN", f'"{sys.executable}" -m kappa_lightning scan "{checkpoint}"')
    environment = {**os.environ, **env}
    environment.pop("COLUMNS", None)
    return subprocess.run(["bash", "-c", command], capture_output=True, env={**environment, **env}, check=False)


def test_package_can_be_run_as_a_module(checkpoint):
    done = shell("SCAN --names --top-p 1", checkpoint)
    assert (done.returncode, done.stdout.decode()) == (0, "b.weight\ngröße.weight\n")


def test_stream_that_has_no_unicode_shows_the_table_in_ascii(checkpoint):
    done = shell("SCAN", checkpoint, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr.count(b"rror")) == (0, 0)
    table = done.stdout.decode("ascii")
    for part in ("kappa", "2x2", "inf", "gr\\xf6\\xdfe.weight", "b.weight", "1 of 2 tensors trains"):
        assert part in table


@pytest.mark.slow
def test_reader_of_the_table_who_has_seen_enough_is_no_error(checkpoint):
    done = shell("set -o pipefail; SCAN | head -n 1; exit ${PIPESTATUS[0]}", checkpoint)
    assert (done.returncode, done.stderr.count(b"rror")) == (0, 0)
    closed = shell("SCAN | true; exit ${PIPESTATUS[0]}", checkpoint)
    assert (closed.returncode, closed.stderr.count(b"rror")) == (0, 0)


@pytest.mark.slow
def test_closed_streams_are_no_error_and_get_into_no_file(checkpoint, tmp_path):
    for closing in ("2>&-", ">&-", ">&- 2>&-"):
        done = shell(f'SCAN --out "{tmp_path}/kappa.json" --figure "{tmp_path}/k.png" {closing}', checkpoint)
        assert done.returncode == 0
        kappa_lightning.KappaProfile.load(tmp_path / "kappa.json")
        assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        (tmp_path / "kappa.json").unlink()
    failed = shell("SCAN --top-p 2 2>&-", checkpoint)
    assert (failed.returncode, failed.stdout) == (1, b"")


def test_warning_of_a_scan_is_one_line_without_python_and_its_names_are_escaped(tmp_path, capsys):
    torch.save({"up\x1b[2J.weight": torch.randn(3, 4, 5)}, tmp_path / "w.pt")
    assert main(["scan", str(tmp_path / "w.pt")]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert line.startswith("kappa-lightning: warning: ")
    assert "no config.json beside it" in line
    assert "up\\x1b[2J.weight" in line
