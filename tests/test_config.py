"""Options: flag > environment > YAML > default, checked wherever they come from."""

import dataclasses
import re
import sys
import types
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from polarctl import cli, config
from polarctl.config import Common, resolved, semantic, shard_of, shown
from polarctl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Options of the stage of these tests."""

    model: Annotated[str, typer.Option("--model", "-m", help="A model.")] = "none"
    rate: Annotated[float, typer.Option(min=0, help="A rate.")] = 0.5
    names: Annotated[tuple[str, ...], typer.Option("--name", help="Names.")] = ()


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Runs `polarctl demo ARGUMENTS`; gives the config, or the exit status of a refusal."""
    got = []
    module = types.ModuleType("polarctl.stages.demo", "A stage.")
    module.Config, module.run = Config, got.append
    monkeypatch.setitem(sys.modules, "polarctl.stages.demo", module)
    monkeypatch.setattr(cli, "STAGES", [*cli.STAGES, "demo"])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, yaml: str | None = None):
        got.clear()
        if yaml is not None:
            (tmp_path / "run.yaml").write_text(yaml, encoding="utf-8")
            arguments = (*arguments, "--config", "run.yaml")
        status = cli.run(["demo", *arguments])
        return got[0] if got else status

    return run


def test_a_flag_beats_the_environment_beats_yaml_beats_the_default(parse, monkeypatch):
    assert parse().seed == 0
    assert parse(yaml="seed: 1").seed == 1
    monkeypatch.setenv("POLARCTL_DEMO_SEED", "2")
    assert parse(yaml="seed: 1").seed == 2
    assert parse("--seed", "3", yaml="seed: 1").seed == 3
    assert parse().seed == 2


def test_the_config_file_itself_can_come_from_the_environment(parse, monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 5\nmodel: m\n")
    monkeypatch.setenv("POLARCTL_DEMO_CONFIG", "c.yaml")
    assert (parse().seed, parse().model) == (5, "m")


@pytest.mark.parametrize(
    ("yaml", "key", "value"),
    [
        ("rate: 1e-5", "rate", 1e-5),  # YAML reads this as a text
        ("rate: 2", "rate", 2.0),
        ('seed: "3"', "seed", 3),
        ("input: a.jsonl", "input", ("a.jsonl",)),
        ("input: [a.jsonl, b.jsonl]", "input", ("a.jsonl", "b.jsonl")),
        ("names: x", "names", ("x",)),
        ("no-color: true", "no_color", True),
        ("no_color: true", "no_color", True),
        ("resume: false\noutput: x", "resume", False),
        ("limit: null", "limit", None),
        ("output: 3", "output", "3"),
        ("shard: 1/4", "shard", "1/4"),
        ("", "seed", 0),
        ("# nothing", "seed", 0),
    ],
)
def test_yaml_values_arrive_as_their_types(parse, yaml, key, value):
    got = getattr(parse(yaml=yaml), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("seed: abc", "invalid value for `--seed`"),
        ("seed: 1.5", "invalid value for `--seed`"),
        ("seed: true", "run.yaml: `seed` takes no `true`"),
        ("seed: [1]", "run.yaml: `seed` takes one value, not [1]"),
        ("seed: {a: 1}", "run.yaml: `seed` takes one value, not {'a': 1}"),
        ("input: {a: 1}", "run.yaml: `input` takes one value, not {'a': 1}"),
        ("manifest: [a]", "run.yaml: `manifest` takes one value, not ['a']"),
        ("limit: 0", "invalid value for `--limit`"),
        ("rate: -1", "invalid value for `--rate`"),
        ("resume: maybe", "invalid value for `--resume`"),
        ("[a, b]", "run.yaml: must be a mapping of options to values"),
        ("a: [", "run.yaml: no YAML"),
        ("config: other.yaml", "run.yaml: unknown key `config`"),
        ("seed: 1\nrate: 2\nseed: 3", "run.yaml:3: `seed` is given twice"),
        ("no-color: true\nno_color: true", "run.yaml: `no_color` is given twice"),
        ('model: ""', "`--model` is empty"),
        ("names: [a, '']", "`--name` is empty"),
        ("force: true", "`--force` has no effect here: it is for `-o FILE` or"),
    ],
)
def test_a_wrong_yaml_value_is_a_usage_error(parse, capsys, yaml, said):
    assert parse(yaml=yaml) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_key_names_the_nearest(parse, capsys):
    assert parse(yaml="sed: 1") == 2
    assert capsys.readouterr().err.splitlines() == [
        "polarctl: run.yaml: unknown key `sed`",
        "hint: did you mean `seed`?",
    ]
    assert parse(yaml="zzzz: 1") == 2
    assert "hint: known keys: input, output, config, seed" in capsys.readouterr().err


def test_an_unknown_variable_names_the_nearest(parse, capsys, monkeypatch):
    monkeypatch.setenv("POLARCTL_DEMO_SEEED", "1")
    assert parse() == 2
    assert capsys.readouterr().err.splitlines() == [
        "polarctl: unknown environment variable `POLARCTL_DEMO_SEEED`",
        "hint: did you mean `POLARCTL_DEMO_SEED`?",
    ]


def test_the_variables_of_another_stage_are_let_be(parse, monkeypatch):
    monkeypatch.setenv("POLARCTL_SAMPLE_WHATEVER", "1")
    assert parse().seed == 0


def test_a_wrong_variable_is_a_usage_error(parse, capsys, monkeypatch):
    monkeypatch.setenv("POLARCTL_DEMO_FORCE", "maybe")
    assert parse() == 2
    assert "invalid value for `--force`" in capsys.readouterr().err


def test_a_missing_config_file_is_a_usage_error(parse, capsys):
    assert parse("--config", "none.yaml") == 2
    assert "polarctl: none.yaml: No such file or directory" in capsys.readouterr().err


def test_a_config_file_that_is_no_text_is_a_usage_error(parse, capsys, tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert parse("--config", "b.yaml") == 2
    assert "polarctl: b.yaml: no YAML" in capsys.readouterr().err


def test_a_yaml_file_cannot_run_code(parse, capsys, tmp_path):
    assert parse(yaml="model: !!python/object/apply:os.mkdir [owned]") == 2
    assert not (tmp_path / "owned").exists()
    assert "no YAML" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/1", "3/4", "0/1000"])
def test_shards_are_parsed(text):
    index, count = shard_of(text)
    assert f"{index}/{count}" == text


@pytest.mark.parametrize("text", ["", "1", "/", "1/", "/4", "4/4", "-1/4", "1/0", "a/b", "1/2/3"])
def test_a_wrong_shard_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not of the form I/N") as caught:
        shard_of(text)
    assert caught.value.hint == "`--shard 0/4`"


def test_what_is_computed_is_told_from_how_it_is_run():
    config = Config(input=("a", "b"), output="out", model="m", quiet=True, rejects="r")
    assert resolved(config)["input"] == ["a", "b"]
    assert semantic(config) == {
        "seed": 0,
        "limit": None,
        "shard": None,
        "model": "m",
        "rate": 0.5,
        "names": [],
    }


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--model", "a", "-m", "b"], "--model"),
        (["--seed", "1", "--seed", "1"], "--seed"),
        (["-q", "--quiet"], "--quiet"),
        (["-o", "x", "--resume", "--no-resume"], "--resume"),
    ],
)
def test_an_option_that_takes_one_value_is_given_once(parse, capsys, arguments, flag):
    assert parse(*arguments) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"polarctl: `{flag}` is given twice"


def test_an_option_that_takes_several_is_given_again(parse):
    assert parse("--name", "a", "--name", "a", "x", "y").names == ("a", "a")


def test_what_the_user_has_set_is_known_and_is_no_part_of_the_options(parse, monkeypatch):
    monkeypatch.setenv("POLARCTL_DEMO_RATE", "0.5")
    found = parse("--seed", "0", yaml="model: none\nlimit: null\nforce: false")
    assert found.given == {
        "config": "command line",
        "seed": "command line",
        "rate": "environment",
        "model": "config",
    }
    assert found == Config(config="run.yaml")
    assert "given" not in resolved(found)


@pytest.mark.parametrize(
    ("set_in", "hint"),
    [
        ("flag", "leave it out"),
        ("environment", "unset POLARCTL_DEMO_RESUME"),
        ("yaml", "take `resume` out of run.yaml"),
    ],
)
def test_the_hint_says_where_an_idle_option_comes_from(parse, capsys, monkeypatch, set_in, hint):
    if set_in == "environment":
        monkeypatch.setenv("POLARCTL_DEMO_RESUME", "0")
    arguments = ["--no-resume"] if set_in == "flag" else []
    assert parse(*arguments, yaml="resume: false" if set_in == "yaml" else None) == 2
    assert capsys.readouterr().err.splitlines()[1] == f"hint: {hint}"


def test_a_plan_shows_options_that_are_zero_or_switched_off():
    found = shown(Config(rate=0, seed=0, resume=False, output="x"))
    assert found["rate"] == 0 and found["seed"] == 0 and found["resume"] is False
    assert not {"force", "quiet", "limit", "names", "config"} & set(found)


@pytest.mark.parametrize("stage", cli.STAGES)
def test_print_config_lists_every_option_and_each_line_reads_back(stage, tmp_path, capfd):
    """The file as printed sets nothing; without the `#` it sets each option to its default."""
    import importlib

    config_type = importlib.import_module(f"polarctl.stages.{stage}").Config
    assert cli.run([stage, "--print-config"]) == 0
    text = capfd.readouterr().out
    file = tmp_path / "all.yaml"
    file.write_text(text)
    assert config.read_yaml(str(file), config_type) == {}
    options = re.findall(r"^#(\w+):(.*)$", text, re.M)
    assert [name for name, _ in options] == [n for n in config.keys(config_type) if n != "config"]
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    file.write_text("".join(f"{name}:{value}\n" for name, value in options))
    for name, found in config.read_yaml(str(file), config_type).items():
        default = fields[name].default
        if default is dataclasses.MISSING:
            assert found is None
        else:
            assert (tuple(found) if isinstance(found, list) else found) == default


def test_print_config_keeps_what_is_typed_and_the_file_gives_the_same_run(tmp_path, capfd):
    typed = ["finetune", "a.jsonl", "-m", "lm", "--lr", "1e-5", "--report-to", "tensorboard"]
    assert cli.run([*typed, "--no-shared-prefix", "--print-config"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capfd.readouterr().out)
    from polarctl.stages.finetune import Config

    assert config.read_yaml(str(file), Config) == {
        "input": ["a.jsonl"],
        "model": "lm",
        "lr": 1e-5,
        "report_to": ["tensorboard"],
        "shared_prefix": False,
    }
