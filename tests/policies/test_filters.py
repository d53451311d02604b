"""Filters of texts, against texts whose length and language are known."""

import json
import sys
from pathlib import Path

import orjson
import pytest

from polarctl import cli
from polarctl.errors import MissingError, UsageError
from polarctl.policies.filters import Filters

# From the Universal Declaration of Human Rights, article 1.
TEXTS = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
}


@pytest.mark.parametrize("asked", [("en",), ("zh", "ru"), ("fr", "de", "es", "el")])
def test_a_text_in_another_language_is_left_out_and_its_own_is_told(asked):
    filters = Filters(languages=asked)
    filters.check()
    for code, text in TEXTS.items():
        why = None if code in asked else "other language"
        assert filters.look(text, 20) == (why, code)


def test_a_short_text_has_no_language():
    filters = Filters(languages=("zh",))
    assert filters.look("Of course. 1234567890", 20) == (None, None)
    assert filters.look("abcd " * 5, 20)[0] == "other language"  # 20 letters


@pytest.mark.parametrize(
    ("tokens", "why"), [(0, "too short"), (4, "too short"), (5, None), (9, None), (10, "too long")]
)
def test_bounds_are_kept(tokens, why):
    assert Filters(5, 9).look("text", tokens) == (why, None)


def test_what_keeps_nothing_or_is_unknown_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="`--drop-longer 4` is less than `--drop-shorter 5`"):
        Filters(5, 4).check()
    with pytest.raises(UsageError, match="`--language xx`: no such language") as caught:
        Filters(languages=("en", "xx")).check()
    assert "en, " in caught.value.hint and "zh" in caught.value.hint
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(MissingError, match="py3langid") as missing:
        Filters(languages=("en",)).check()
    assert "polarctl[language]" in missing.value.hint


def test_a_run_leaves_texts_out_counts_them_and_keeps_the_rest_as_they_were(
    tmp_path, tiny_lm, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    rows = [{"prompt": f"Text {number} is", "id": f"t{number}"} for number in range(30)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    command = ["sample", str(tmp_path / "in.jsonl"), "-m", str(tiny_lm), "--max-new-tokens", "24"]
    bounds = ["--drop-shorter", "8", "--drop-longer", "20"]
    found, counts = {}, {}
    for name, more in {"raw": ["--no-clean"], "all": [], "some": bounds}.items():
        out = tmp_path / f"{name}.jsonl"
        assert cli.run([*command, "-o", str(out), *more]) == 0
        found[name] = [orjson.loads(line) for line in out.read_bytes().splitlines()]
        manifest = json.loads(Path(f"{out}.manifest.json").read_bytes())
        (counts[name],) = manifest["counts"]["policies"].values()
    raw = {(r["id"], r["sample"]): len(r["output"]) for r in found["raw"]}

    def tokens(record):
        """Of what cleaning left: as many as its share of the characters."""
        whole = raw[record["id"], record["sample"]]
        return round(record["num_tokens"] * len(record["output"]) / whole)

    short = sum(tokens(record) < 8 for record in found["all"])
    long = sum(tokens(record) > 20 for record in found["all"])
    assert short > 2 and long > 2 and short + long < len(found["all"]) - 2
    assert found["some"] == [r for r in found["all"] if 8 <= tokens(r) <= 20]
    assert (counts["some"]["too short"], counts["some"]["too long"]) == (short, long)
    assert "too short" not in counts["all"]
    said = [line.split() for line in capfd.readouterr().err.splitlines()]
    heads = [words[-1] for words in said if words[:1] == ["Policy"]]
    assert heads == ["Tokens/s", "Tokens/s", "Filtered"]
    rows = [words[-1] for words in said if words[:1] == ["tiny-base"]]
    assert rows[-1] == f"{short + long}"
