"""Secrets of all kinds are found in what is published, and little else is taken for one."""

import io
import json
import os
import random
import re
import time

import pytest
from hub.secret_kinds import harmless, inside, kinds

from polarctl.hub import secrets
from polarctl.hub.secrets import environment_secrets, find_secrets

KINDS = kinds(1)


def found(text, known=None, *, escaped=True):
    data = text if isinstance(text, bytes) else text.encode()
    return list(find_secrets(io.BytesIO(data), known or {}, escaped=escaped))


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_of_each_kind_is_found_in_text_in_code_and_in_escapes(kind):
    for seed in (1, 2):
        for how, line in inside(kinds(seed)[kind]).items():
            before = '{"prompt": "Hi", "output": "Nothing here\\n"}\n' * 6
            places = found(before + line + "\n" + before)
            assert {place.line for place in places} == {7}, (seed, how)


def test_a_secret_inside_json_inside_a_record_is_found():
    for kind in ("huggingface", "gitlab", "aws-secret"):
        arguments = json.dumps({"note": "a\n" + kinds(3)[kind] + "\nb"})
        call = json.dumps({"name": "login", "arguments": arguments})
        assert found(json.dumps({"prompt": "x", "output": [{"role": "tool", "content": call}]}))


@pytest.mark.parametrize("kind", harmless())
def test_what_is_no_secret_is_left_alone(kind):
    assert found(harmless()[kind]) == []
    assert found(harmless()[kind], escaped=False) == []


def test_a_tokenizer_and_text_of_every_kind_of_letter_hold_none(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz_ABCDEF0123456789", k=9))
             for _ in range(6000)]  # fmt: skip
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([" ".join(words)], vocab_size=6000, show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.save_model(str(tmp_path))
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        data = (tmp_path / name).read_bytes()
        assert data and found(data, escaped=name.endswith("json")) == []


def test_a_secret_at_every_place_around_the_border_of_a_block_is_found_once(monkeypatch):
    monkeypatch.setattr(secrets, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(secrets, "_OVERLAP_BYTES", 1024)
    secret = KINDS["gitlab"]
    (alone,) = found(secret)
    for line, gap in (("x" * 63 + "\n", "\n"), ("word " * 8, " "), ("x" * 64, " ")):
        for shift in range(0, 120, 7):
            before = (line * 100)[: 4096 - 90 + shift] + gap
            places = found(before + secret + gap + line * 100)
            assert places == [secrets.Secret(before.count("\n") + 1, alone.what, alone.hash)]


def test_memory_is_bounded_whatever_the_length_of_the_file_and_of_its_lines():
    class Endless(io.RawIOBase):
        """Lines of 32 MiB, never all of them at once."""

        left, most = 96 << 20, 0

        def read(self, size=-1):
            self.most = max(self.most, size)
            size = min(size, self.left)
            self.left -= size
            return b"a b " * (size // 4)

    stream = Endless()
    assert list(find_secrets(stream, {})) == []
    assert stream.left == 0 and 0 < stream.most <= 16 << 20


def test_a_place_is_named_by_a_hash_that_is_the_same_everywhere_and_never_by_the_secret():
    secret = KINDS["npm"]
    first = found(f"# Title\n\n{secret}\n", escaped=False)
    second = found(json.dumps({"output": f"see\n{secret}"}))
    assert [p.line for p in first + second] == [3, 1]
    assert first[0].hash == second[0].hash and re.fullmatch("[0-9a-f]{16}", first[0].hash)
    assert secret not in repr(first)


def test_values_of_variables_are_found_however_they_are_written():
    value = 'Blue"horse\\7é'
    known = environment_secrets({"shop_db_pwd": value})
    texts = {
        "json": json.dumps({"output": value}),
        "utf-8": json.dumps({"output": value}, ensure_ascii=False),
        "escapes": '{"output": "\\u0042lue\\"horse\\\\7é"}',
        "twice": json.dumps({"output": json.dumps({"a": value}, ensure_ascii=False)},
                            ensure_ascii=False),
    }  # fmt: skip
    for how, text in texts.items():
        assert [p.what for p in found(text, known)] == ["the value of $shop_db_pwd"], how
    assert found(value, known, escaped=False)[0].line == 1


@pytest.mark.parametrize(
    "name",
    ["A_TOKEN", "DB_PWD", "db_password", "apiKey", "PGPASSWORD", "gh_pat", "MYSQL_PASS", "KEY_2",
     "NPM_AUTH", "aws_secret_access_key"],
)  # fmt: skip
def test_secret_variables_are_told_by_their_names(name):
    assert environment_secrets({name: "x9" * 6}) == {f"the value of ${name}": b"x9" * 6}


def test_other_variables_are_no_secrets():
    words = {
        "B_KEY": "short",
        "PATH": "y" * 20,
        "C_SECRET": "/run/secrets/file",
        "PWD": os.getcwd(),
    }
    words |= {"COMPASS": "north by west", "SSH_KEY": "~/.ssh/id", "D_TOKEN": "password"}
    assert environment_secrets(words) == {}
    assert environment_secrets({"E_KEY": "/" + "q8" * 10}) != {}  # base64 may start like this


def test_a_gigabyte_takes_seconds_and_not_hours():
    """A floor far below what was measured (60 MB/s on a loaded core), against a slow pattern."""
    text = harmless()
    data = "\n".join(text[kind] for kind in ("gsm8k", "code", "uuids", "metrics")).encode() * 80
    found(b"start")
    started = time.process_time()
    assert found(data) == []
    assert len(data) / (time.process_time() - started) > 4e6
