"""The command line's contract, on the real program; a small stage, `demo`, stands for slow work."""

import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from polarctl import cli, config
from polarctl.cli import STAGES

PROGRAM = str(Path(sys.executable).parent / "polarctl")

# The real program with one more stage: it copies records, slowly when asked to.
DEMO = """
    import sys, time, types
    from dataclasses import dataclass
    from polarctl import cli
    from polarctl.config import Common

    @dataclass(frozen=True, kw_only=True)
    class Config(Common):
        pause: float = 0.0

    Config.__annotations__["pause"] = __import__("typing").Annotated[
        float, __import__("typer").Option(help="Seconds per record.")]

    def run(config):
        from polarctl import console
        from polarctl.storage import read, windows
        from polarctl.storage.write import Output
        print("a library talks on stdout")
        console.choice("device", "cpu", "no GPU")
        paths = windows.inputs_of("demo", config)
        with Output("demo", config, read.sizes(paths)) as out:
            reader = windows.reader_of(config, paths, None, on_bad=out.reject)
            def work(window):
                for record in window:
                    time.sleep(config.pause)
                    yield record
            windows.map_windows(out, reader, work, size=1, title="demo")
        console.note("done")

    module = types.ModuleType("polarctl.stages.demo", "Copy.")
    module.Config, module.run = Config, run
    sys.modules["polarctl.stages.demo"] = module
    cli.STAGES.append("demo")
    cli.main()
"""


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(DEMO), "demo", *arguments]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    options = {"stdin": subprocess.DEVNULL, "text": True, "timeout": 60, **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run(command, capture_output=True, **options)


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"n":{n}}}\n' for n in range(5000)))
    return str(path)


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# -- streams --------------------------------------------------------------------------------------


def test_only_records_go_to_stdout(rows):
    result = run(demo(rows, "--limit", "3"))
    assert result.returncode == 0
    assert result.stdout == '{"n":0}\n{"n":1}\n{"n":2}\n'
    assert result.stderr.splitlines() == [
        "a library talks on stdout",
        "device: cpu (no GPU)",
        "done",
    ]


def test_records_pass_through_a_pipe():
    result = run(demo("-q"), input='{"n":1}\n{"n":2}\n')
    assert (result.returncode, result.stdout) == (0, '{"n":1}\n{"n":2}\n')


def test_quiet_leaves_only_warnings_and_errors(rows, tmp_path):
    result = run(demo(rows, "-q", "--limit", "1"))
    assert result.stderr == "a library talks on stdout\n"  # not ours to silence
    bad = run(demo("-q", "--rejects", str(tmp_path / "bad")), input="{\n")
    assert bad.stderr.splitlines()[1:] == [f"warning: 1 records set aside in {tmp_path / 'bad'}"]


def test_json_messages_are_json_lines(rows):
    result = run(demo(rows, "--json", "--limit", "1"))
    messages = [json.loads(line) for line in result.stderr.splitlines()[1:]]
    assert [m["level"] for m in messages] == ["info", "info"]
    assert messages[0]["choice"] == "device" and messages[0]["reason"] == "no GPU"


def test_json_holds_for_errors_too(capfd):
    assert cli.run(["convert", "--json", "--zzz"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert json.loads(line) == {
        "level": "error",
        "message": "polarctl: no such option: --zzz",
        "hint": "polarctl convert --help",
    }


def on_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and stderr of a command whose stdin and stderr are a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **environment},
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the terminal is gone with the process
            break
        if not block:
            break
        said += block
    os.close(ours)
    return process.wait(timeout=60), said.decode()


def test_colour_is_for_terminals_that_want_it(rows):
    status, said = on_a_terminal(demo("none.jsonl"), {})
    assert status == 2 and "\x1b[31mpolarctl: none.jsonl: no such file\x1b[0m" in said
    for command, more in (
        (demo("none.jsonl", "--no-color"), {}),
        ([PROGRAM, "validate", "--zzz"], {"NO_COLOR": "1"}),
    ):
        status, said = on_a_terminal(command, more)
        assert status == 2 and "\x1b" not in said, said
    assert "\x1b" not in run([PROGRAM, "convert", "--zzz"]).stderr


def test_a_terminal_as_input_is_answered_with_a_short_help():
    status, said = on_a_terminal(demo("--no-color"), {})
    assert status == 2
    assert said.splitlines()[-2:] == [
        "polarctl: no input: name a file or pipe records in",
        "hint: polarctl demo --help",
    ]


def test_a_progress_bar_on_a_terminal_leaves_records_alone(rows):
    ours, theirs = pty.openpty()
    result = subprocess.run(
        demo(rows, "--limit", "50"),
        stdin=subprocess.DEVNULL,
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm"},
        timeout=60,
    )
    os.close(ours), os.close(theirs)
    assert result.returncode == 0
    assert result.stdout.decode() == "".join(f'{{"n":{n}}}\n' for n in range(50))


# -- the end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "schema"])
def test_a_closed_pipe_downstream_is_a_quiet_success(rows, command):
    first = demo(rows, "-q") if command == "demo" else [PROGRAM, "schema", "prompt"]
    read, write = os.pipe()
    process = subprocess.Popen(
        first, stdout=write, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    os.close(write)
    if command == "demo":
        assert os.read(read, 8) == b'{"n":0}\n'
    os.close(read)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "Error" not in said and "Traceback" not in said


def test_sigterm_ends_with_75_and_the_same_command_goes_on(rows, tmp_path):
    target = tmp_path / "out.jsonl"
    command = demo(rows, "--limit", "30", "-o", str(target), "--pause")
    process = subprocess.Popen([*command, "0.04"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: target.exists() and target.stat().st_size > 20)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 5
    assert process.returncode == 75
    assert said.splitlines()[-2:] == [
        "polarctl: stopped by SIGTERM",
        "hint: the same command goes on from here",
    ]
    assert not (tmp_path / "out.jsonl.manifest.json").exists()
    # `--pause` counts as a semantic option: with another value it would be another run.
    refused = run([*command, "0"])
    assert refused.returncode == 2 and "`pause` was 0.04 and is now 0.0" in refused.stderr
    again = run([*command, "0.04"])
    assert again.returncode == 0 and "going on after" in again.stderr
    assert target.read_text() == "".join(f'{{"n":{n}}}\n' for n in range(30))


def test_ctrl_c_ends_with_130_and_says_so(rows, tmp_path):
    target = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        demo(rows, "-o", str(target), "--pause", "0.04"), stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: target.exists() and target.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-2] == "polarctl: stopped by Ctrl-C"
    assert "Traceback" not in said


def test_a_full_disk_ends_with_1_and_says_why(rows):
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            demo(rows, "-q"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2] == "polarctl: cannot write: No space left on device"
    assert "Traceback" not in result.stderr


def test_a_bad_record_ends_with_3(rows, tmp_path):
    result = run(demo("-q"), input='{"n":1}\n{bad\n')
    assert result.returncode == 3
    assert result.stdout == '{"n":1}\n'
    first, hint = result.stderr.splitlines()[-2:]
    assert first.startswith("polarctl: <stdin>:2: no JSON")
    assert hint == "hint: --rejects FILE sets bad records aside and goes on"
    empty = run(demo("-q"), input="")
    assert empty.returncode == 3 and "<stdin>: no records" in empty.stderr


def test_the_environment_does_not_change_the_bytes(rows, tmp_path):
    seen = set()
    for number, more in enumerate(
        (
            {"PYTHONHASHSEED": "1", "TZ": "UTC", "LANG": "C", "COLUMNS": "20"},
            {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8", "COLUMNS": "300"},
        )
    ):
        target = tmp_path / f"{number}.jsonl"
        result = run(demo(rows, "--limit", "9", "-o", str(target)), env={**os.environ, **more})
        assert result.returncode == 0
        seen.add(target.read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_standard_streams_give_no_traceback(tmp_path, closed):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt":"a"}\n')
    given = "-" if closed == "<&-" else path
    result = run(["sh", "-c", f"{PROGRAM} validate {given} {closed}"])
    assert result.returncode == (2 if closed == "<&-" else 0)
    assert "Traceback" not in result.stderr


# -- usage ----------------------------------------------------------------------------------------

WRONG = [
    (["smaple"], "no stage `smaple`", "did you mean `sample`?"),
    (["zzzz"], "no stage `zzzz`", "polarctl --help"),
    (["--zzz"], "no such option: --zzz", "polarctl --help"),
    (["validate", "--zzz"], "no such option: --zzz", "polarctl validate --help"),
    (["validate", "--kind"], "option `--kind` requires an argument", "polarctl validate --help"),
    (["validate", "none.jsonl"], "none.jsonl: no such file", None),
    (["validate", "--kind", "tripel"], "no schema named `tripel`", "did you mean `triple`?"),
    (["schema", "a", "b"], "got unexpected extra argument(s) (b)", "polarctl schema --help"),
    (["schema", "tripel"], "no schema named `tripel`", "did you mean `triple`?"),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), WRONG)
def test_a_usage_error_is_one_line_and_a_hint(arguments, message, hint, capfd):
    assert cli.run(arguments) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"polarctl: {message}",
        *([f"hint: {hint}"] if hint else []),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_an_unknown_option(stage, capfd):
    assert cli.run([stage, "--no-such-option"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("polarctl: no such option: --no-such-option")
    assert f"hint: polarctl {stage} --help" in said


def test_the_program_ends_with_the_status_of_the_command():
    result = run([PROGRAM, "smaple"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "polarctl: no stage `smaple`\nhint: did you mean `sample`?\n"


def test_no_arguments_is_answered_with_the_help():
    result = run([PROGRAM])
    assert result.returncode == 2
    assert "Usage: polarctl" in result.stderr and "Stages:" in result.stderr


def test_the_version_is_printed():
    result = run([PROGRAM, "--version"])
    assert result.returncode == 0
    assert re.fullmatch(r"polarctl \d+\.\d+\.\d+\S*\n", result.stdout)


def test_help_lists_every_stage_with_one_line_each():
    result = run([PROGRAM, "--help"], env={**os.environ, "COLUMNS": "200"})
    assert result.returncode == 0 and result.stderr == ""
    listed = re.findall(r"^  (\w+) +(\S.*)$", result.stdout.partition("Stages:\n")[2], re.M)
    assert [name for name, _ in listed] == STAGES
    assert not [text for _, text in listed if '"' in text or text.endswith(".")]


def test_shell_completion_knows_stages_and_options():
    def complete(words: str) -> str:
        environment = {
            **os.environ,
            "_POLARCTL_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": words,
        }
        return run([PROGRAM], env=environment).stdout

    assert "pretrain" in complete("polarctl pre")
    assert "--kind" in complete("polarctl validate --k")
    # Values that can be listed, optional ones too; for all others the shell's own names of files.
    assert '"bradley-terry"' in complete("polarctl finetune --loss ")
    assert '"chat"' in complete("polarctl score x.jsonl --prompt-style ")
    for words in ("polarctl score ", "polarctl score x.jsonl -m ", "polarctl score x.jsonl -o "):
        assert complete(words).strip() == "_files"


# -- validate and schema --------------------------------------------------------------------------


def test_validate_names_every_bad_line(tmp_path, capfd):
    good = '{"prompt":"a","reference":"b","chosen":"c","rejected":"d"}\n'
    path = tmp_path / "triples.jsonl"
    path.write_text(good + '{"prompt":"a","chosen":"c","rejected":"d"}\n' + "{\n" + good)
    assert cli.run(["validate", str(path)]) == 3
    first, second, last = capfd.readouterr().err.splitlines()
    assert first == f"polarctl: {path}:2: missing field `reference`"
    assert second.startswith(f"polarctl: {path}:3: no JSON")
    assert last == f"polarctl: {path}: 2 of 4 records are bad"
    path.write_text(good)
    assert cli.run(["validate", str(path), "--kind", "triple"]) == 0
    assert capfd.readouterr() == ("", f"{path}: 1 records, all good\n")


def test_validate_reads_every_file(tmp_path, capfd):
    good = '{"prompt":"a","reference":"b","chosen":"c","rejected":"d"}\n'
    texts = {"a": "{\n" + good, "b": good * 3, "c": "", "d": good + '{"prompt":1}\n', "f": good}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(good.encode() * 9)[:-9])
    assert cli.run(["validate", str(tmp_path / "*.jsonl*")]) == 3
    said = [
        line.removeprefix("polarctl: ").removeprefix(f"{tmp_path}/")
        for line in capfd.readouterr().err.splitlines()
    ]
    assert said[0].startswith("a.jsonl:1: no JSON") and "d.jsonl:2: " in said[4]
    assert said[1:4] == [
        "a.jsonl: 1 of 2 records are bad",
        "b.jsonl: 3 records, all good",
        "c.jsonl: no records",
    ]
    assert said[5] == "d.jsonl: 1 of 2 records are bad"
    assert said[6].startswith("e.jsonl.gz: cannot read on: ")
    assert said[7:] == ["f.jsonl: 1 records, all good", "4 of 6 files are bad"]


def test_schema_prints_json_or_the_list_of_kinds():
    result = run([PROGRAM, "schema", "triple"])
    assert json.loads(result.stdout)["required"] == ["prompt", "reference", "chosen", "rejected"]
    assert [line.split("\t")[0] for line in run([PROGRAM, "schema"]).stdout.splitlines()][:3] == [
        "prompt",
        "trajectory",
        "triple",
    ]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("finetune x.jsonl -m m -o o --learning-rate 1e-5", "--lr"),
        ("pretrain x.jsonl --model_name_or_path m -o o", "--model"),
        ("finetune x.jsonl -m m -o o --num-train-epochs 3", "--epochs"),
        ("score x.jsonl --modle m", "--model"),
        ("rft x.jsonl --beta 0.1", "--kl-coef"),
        ("sample x.jsonl --max_tokens 9", "--max-new-tokens"),
    ],
)
def test_an_option_of_another_tool_is_told_by_our_name(words, meant, capfd):
    assert cli.run(words.split()) == 2
    said = capfd.readouterr().err
    assert f"hint: did you mean `{meant}`? polarctl {words.split()[0]} --help" in said


def test_every_name_of_another_tool_leads_to_an_option():
    options = {
        name
        for stage in cli.STAGES
        for parameter in cli.stage_command(stage).params
        for name in parameter.opts
    }
    assert {f"--{name}" for name in config.ELSEWHERE.values()} <= options


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path, capfd):
    data = tmp_path / "t.jsonl"
    data.write_text('{"prompt": "p", "reference": "a", "chosen": "a", "rejected": "b"}\n')
    out = tmp_path / "rm"
    assert cli.run(["finetune", str(data), "-m", str(tmp_path / "nope"), "-o", str(out), "-q"]) == 4
    assert not out.exists()
    out.mkdir()  # the user's own stays
    assert cli.run(["finetune", str(data), "-m", str(tmp_path / "nope"), "-o", str(out), "-q"]) == 4
    assert list(out.iterdir()) in ([], [out / "checkpoints"])
