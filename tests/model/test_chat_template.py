"""Chat templates that loop or flood end in one line; a limit leaves nothing behind."""

import threading
import time

import pytest

from polarctl import cli
from polarctl.errors import UsageError
from polarctl.model import chat_template
from polarctl.model import reward_model as models
from tests.tiny import build_lm

TALK = [{"role": "user", "content": "a"}]
SILENT = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FLOOD = (
    "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "x" * 999
    + "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return build_lm(tmp_path_factory.mktemp("chat") / "policy", chat=True)


def tokenizer_with(policy, template):
    tokenizer = models.load_tokenizer(str(policy))
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_ends_gives_what_the_tokenizer_gives(policy):
    tokenizer = models.load_tokenizer(str(policy))
    talk = [*TALK, {"role": "assistant", "content": "b"}]
    for options in ({}, {"add_generation_prompt": True}):
        given = tokenizer.apply_chat_template(talk, tokenize=False, **options)
        assert chat_template.render(tokenizer, talk, **options) == given


def test_a_template_without_end_is_stopped_in_any_thread(policy, monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_S", 0.3)
    tokenizer, found = tokenizer_with(policy, SILENT), []

    def work():
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(UsageError, match=r"does not end within 0\.3 s"):
                chat_template.render(tokenizer, TALK)
            found.append(time.monotonic() - start)

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(found) == 4 and max(found) < 30  # 10**10 rounds take minutes


def test_a_template_that_writes_without_end_is_stopped(policy):
    with pytest.raises(UsageError, match=r"more than 67,108,864 characters"):
        chat_template.render(tokenizer_with(policy, FLOOD), TALK)


def test_nothing_of_the_limit_reaches_what_comes_after(policy, monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_S", 0.02)
    tokenizer = tokenizer_with(policy, "{% for a in range(n) %}{% endfor %}done")
    ended = 0
    for n in range(1, 99_999, 2_000):  # from well below the limit to about it
        try:
            ended += chat_template.render(tokenizer, TALK, n=n) == "done"
        except UsageError:
            pass
        time.sleep(0.001)
    assert ended
    time.sleep(0.1)


def test_sample_names_the_policy_whose_template_loops(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat_template, "_MOST_S", 0.3)
    folder = build_lm(tmp_path / "looping", chat=True)
    (folder / "chat_template.jinja").write_text(SILENT)
    (folder / "manifest.json").unlink(missing_ok=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    status = cli.run(
        ["sample", str(tmp_path / "prompts.jsonl"), "-m", str(folder), "-o", str(tmp_path / "o")]
    )
    errors = capsys.readouterr().err
    assert status == 2
    assert f"{folder}: the chat template does not end within 0.3 s" in errors
    assert "Traceback" not in errors and not (tmp_path / "o").exists()
