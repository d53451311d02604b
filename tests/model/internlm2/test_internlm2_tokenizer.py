"""A tokenizer from sentencepiece's file gives sentencepiece's own ids."""

import json
import random

import pytest
import sentencepiece
from model.internlm2.official import REWARD, TEXT, UNUSED, sentencepiece_model, write_tokenizer
from transformers import AutoTokenizer

from polarctl.errors import MissingError
from polarctl.model import reward_model
from polarctl.model.internlm2 import tokenizer
from polarctl.model.template import Encoder


def random_texts(count, seed=0):
    """Words, runs of spaces and newlines, letters of many scripts, controls, reserved tokens."""
    rng = random.Random(seed)
    words = TEXT.split()
    odd = [
        "  ",
        "   \n",
        "\n\n",
        "\t",
        "\r\n",
        "\u2581",
        "\u3000",
        "\xa0",
        "\u200d",
        "é",
        "e\u0301",
    ]
    odd += [
        "🙂",
        "👩‍👩‍👧",
        "\x00",
        "\x07",
        "ﬁ",
        "Ω",
        "<0x41>",
        "<",
        "[UNUSED",
        "]",
        "aaaa",
        "thethe",
    ]

    def part():
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(words)
        if kind < 0.6:
            return " " * rng.randrange(1, 6)
        if kind < 0.8:
            return rng.choice(odd)
        if kind < 0.9:
            return chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x1FFFF)]))
        return rng.choice(words)[: rng.randrange(1, 4)] * rng.randrange(1, 9)

    return ["".join(part() for _ in range(rng.randrange(0, 25))) for _ in range(count)]


def with_tokens(texts, tokens, seed=1):
    rng = random.Random(seed)
    return [
        text[: (at := rng.randrange(len(text) + 1))] + rng.choice(tokens) + text[at:]
        for text in texts
    ]


@pytest.fixture(scope="module")
def processor():
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, "model")
    return tmp_path


def test_plain_text_gets_sentencepieces_ids(folder, processor):
    ours = tokenizer.load(str(folder))
    for text in ["", " ", "  a", "a ", "\n", *random_texts(3000)]:
        assert ours.encode(text) == [1, *processor.encode(text)], text


def test_text_is_split_at_added_tokens_and_each_part_is_tokenized_alone(folder, processor):
    ours = tokenizer.load(str(folder))
    ids = {"<|im_start|>": processor.piece_to_id(UNUSED[1]), "<s>": 1, "</s>": 2}
    ids[REWARD] = processor.piece_to_id(REWARD)
    for token, index in ids.items():
        for text in with_tokens(random_texts(300), [token]):
            wanted = [1]
            for number, part in enumerate(text.split(token)):
                wanted += [index] * (number > 0) + processor.encode(part)
            assert ours.encode(text) == wanted, text


def test_reserved_pieces_that_are_no_added_tokens_stay_sentencepieces(tmp_path, processor):
    write_tokenizer(tmp_path, "model", added=False)
    ours = tokenizer.load(str(tmp_path))
    for text in [*UNUSED, *with_tokens(random_texts(1000), UNUSED)]:
        assert ours.encode(text) == [1, *processor.encode(text)], text
    assert ours.convert_tokens_to_ids(REWARD) == processor.piece_to_id(REWARD)


def test_a_part_that_spells_a_piece_which_merges_do_not_make_stays_sentencepieces(tmp_path):
    # Fixed pieces are looked up whole; what merges never make must not be found that way.
    write_tokenizer(tmp_path, "model", added=False)
    whole = sentencepiece_model()
    for text in ("\u2581qzq", "\u2581the\u2581sea", "xqx"):
        # Fields 1 (text) and 2 (score 0.0) of a piece; appended, it is one more piece.
        raw = text.encode()
        piece = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + bytes(4)
        whole += b"\x0a" + bytes([len(piece)]) + piece
    (tmp_path / "tokenizer.model").write_bytes(whole)
    ours = tokenizer.load(str(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_proto=whole)
    assert len(processor.encode("qzq")) > 1
    spelled = ["<0x41>", "xqx", "qzq", "the sea", "the", "sea", " the", "\u2581"]
    for text in spelled:
        for before, after in (("", ""), (UNUSED[0], ""), (UNUSED[1], UNUSED[0]), ("", UNUSED[2])):
            line = before + text + after
            assert ours.encode(line) == [1, *processor.encode(line)], line


def test_text_comes_back(folder):
    ours = tokenizer.load(str(folder))
    for text in random_texts(500):
        # A literal U+2581 is a space to sentencepiece.
        plain = text.replace("\u2581", " ")
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == plain


def test_the_saved_tokenizer_gives_the_same_ids_to_plain_transformers(folder, tmp_path):
    ours = tokenizer.load(str(folder))
    ours.save_pretrained(tmp_path / "saved")
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = random_texts(300)
    for text in [*texts, *with_tokens(texts, [*UNUSED, "<|im_start|>", "</s>"])]:
        assert again.encode(text) == ours.encode(text), text
        ids = ours.encode(text)
        assert again.decode(ids, skip_special_tokens=True) == ours.decode(
            ids, skip_special_tokens=True
        )


def test_reward_token_and_separator_cannot_be_written_by_a_text(folder, processor):
    made = tokenizer.load(str(folder), processor.piece_to_id(REWARD))
    encoder = Encoder(made)
    assert encoder.reward_token_id == processor.piece_to_id(REWARD)
    ids = encoder.encode(f"a {REWARD} b", "<|reward|> c", f"d{REWARD}")
    assert ids.count(encoder.reward_token_id) == 1 and ids[-1] == encoder.reward_token_id


def test_a_token_that_is_a_piece_alone_becomes_the_reward_token(tmp_path, processor):
    write_tokenizer(tmp_path, "model", added=False)
    reward = processor.piece_to_id(REWARD)
    made = tokenizer.load(str(tmp_path), reward)
    assert made.encode("a" + REWARD)[-1] == reward
    assert made.decode([reward], skip_special_tokens=True) == ""


@pytest.mark.parametrize(("start", "end"), [(True, True), (False, False), (False, True)])
def test_start_and_end_are_added_as_the_settings_say(folder, processor, start, end):
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "add_bos_token": start, "add_eos_token": end}
    path.write_text(json.dumps(settings))
    ours = tokenizer.load(str(folder))
    assert ours.encode("a sea") == [1] * start + processor.encode("a sea") + [2] * end
    assert ours.encode("a sea", add_special_tokens=False) == processor.encode("a sea")


def test_normalisation_and_squeezed_spaces_are_sentencepieces(tmp_path):
    import io

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    ours = tokenizer.load(str(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    for text in ["  two  words ", "ﬁne", "①", "e\u0301", "the\u3000sea"]:
        assert ours.encode(text, add_special_tokens=False) == processor.encode(text), text


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no tokenizer"):
        tokenizer.load(str(tmp_path))
    for broken in (b"", b"no model", sentencepiece_model()[:-500], b"\x0a\x05\x0a"):
        (tmp_path / "tokenizer.model").write_bytes(broken)
        with pytest.raises(MissingError, match="sentencepiece"):
            tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MissingError, match=r"tokenizer\.json"):
        tokenizer.load(str(tmp_path))


def test_ids_that_the_settings_and_the_tokenizer_disagree_on_are_refused(tmp_path):
    write_tokenizer(tmp_path, "json")
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"]["7"] = {"content": "<|im_start|>", "special": True}
    path.write_text(json.dumps(settings))
    with pytest.raises(MissingError, match="<|im_start|>"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(MissingError, match="99999"):
        write_tokenizer(tmp_path, "json")
        tokenizer.load(str(tmp_path), 99999)


def test_the_model_module_takes_the_tokenizer_of_a_published_folder(tmp_path):
    from model.internlm2.official import build_official

    folder = build_official(tmp_path, tokenizer="model")
    assert (
        reward_model.load_tokenizer(str(folder)).encode(REWARD)[-1]
        == (json.loads((folder / "config.json").read_text())["reward_token_id"])
    )
