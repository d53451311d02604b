"""What is said: nothing that others wrote can act on a terminal, and no secret is shown."""

import json

import pytest

from polarctl import console
from polarctl.cli import run

SECRET = "S3ntinel/of+this=test"


@pytest.fixture(autouse=True)
def forget():
    before = set(console._hidden)
    yield
    console._hidden.clear()
    console._hidden.update(before)


def test_words_of_others_become_one_short_clean_line():
    assert console.plain(" a\n\tb\u2028c ") == "a b c"
    assert console.plain("x\x1b[31mred\x9b0m\u202eabc\ud800") == (
        r"x\x1b[31mred\x9b0m\u202eabc\ud800"
    )
    assert console.plain("naïve 日本 🙂") == "naïve 日本 🙂"
    assert console.plain("a" * 400) == "a" * 297 + "..."
    assert console.plain("see http://me:PW@host:1/x?a=b@c") == "see http://***@host:1/x?a=b@c"
    assert console.plain("http://host:80/a@b") == "http://host:80/a@b"


def test_a_secret_is_hidden_before_a_line_is_cut():
    console.hide(SECRET)
    assert console.plain("a" * 290 + SECRET) == "a" * 290 + "***"


@pytest.mark.parametrize("json_lines", [False, True])
def test_no_message_shows_a_hidden_text_or_an_escape(json_lines, capsys):
    console.hide(SECRET, "ab")
    console.configure(quiet=False, verbose=True, color=False, json_lines=json_lines)
    console.note(f"note {SECRET}", config={"url": f"http://u:{SECRET}@h"}, rows=3, many=[SECRET])
    console.warn(f"warn \x1b[2J {SECRET}")
    console.error(f"error {SECRET}", hint=f"hint \x9b {SECRET}")
    console.choice("what", SECRET, "why \x1b")
    console.note("about")  # two characters are no secret: `about` stays
    said = capsys.readouterr().err
    assert SECRET not in said and "\x1b" not in said and "\x9b" not in said and "about" in said
    assert console.choices() == {"what": {"value": "***", "reason": r"why \x1b"}}
    if json_lines:
        first = json.loads(said.splitlines()[0])
        assert first["config"] == {"url": "http://***@h"} and first["rows"] == 3
        assert first["many"] == ["***"]


def test_secrets_of_the_environment_are_never_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRET)
    assert run(["score", str(tmp_path / SECRET.replace("/", "_")), "-m", SECRET]) == 2
    assert run(["validate", SECRET]) == 2
    said = capfd.readouterr().err
    assert SECRET not in said and "***" in said


class Clock:
    """Seconds, as told."""

    now = 0.0

    def monotonic(self):
        return self.now


def test_without_a_terminal_a_line_comes_every_30_seconds_with_the_time_left(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    console.configure(quiet=False, verbose=False, color=False, json_lines=False)
    with console.progress("score", 1000, "records") as bar:
        # An earlier run did 500, and this one goes on with 5 a second.
        for second in range(0, 101, 5):
            clock.now = float(second)
            bar.update(500 + 5 * second)
    assert capsys.readouterr().err.splitlines() == [
        "score: 650/1,000 records, 5.0/s, 1 min 10 s left",
        "score: 800/1,000 records, 5.0/s, 40 s left",
        "score: 950/1,000 records, 5.0/s, 10 s left",
    ]
    with console.progress("pretrain", 1000, "steps", eta=False) as bar:
        bar.update(1)
        clock.now += 30
        bar.update(31, "loss 0.5 | 3 h left")  # the one time that is said
    assert capsys.readouterr().err == "pretrain: 31/1,000 steps, 1.0/s loss 0.5 | 3 h left\n"
