"""The POLAR template, against an oracle and against ids worked out by hand.

The tokenizers are trained or written here, offline: `byte_level` (GPT-2 style, BOS, both markers
special), `llama_style` (metaspace and byte fallback; the separator is ordinary text and the reward
token an added token that decoding does NOT skip), `no_bos` (as `byte_level` without BOS) and
`words` (whole words, so that every id can be read off).
"""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from polarctl.model.template import Encoded, Encoder, content_text

SEP = "<|reward|>"
END = "[UNUSED_TOKEN_130]"
CORPUS = [
    "How many r's are in the word strawberry?\nThere are three r's in the word.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Where was the game played? It was played in Texas. Été à Zürich, 北京 and 東京.",
    "the reward of a token is <unknown>, [unused] or | nothing |",
] * 3


def _bos(backend: Backend, bos: str) -> None:
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _byte_level(bos: bool) -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", SEP, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        _bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        additional_special_tokens=[SEP, END],
    )


def _llama_style() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    # Not across lines: that would make one token of whole lines, and no test would cut inside them.
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainer)
    backend.pre_tokenizer = None
    backend = _without_added_bytes(backend, byte_tokens)
    _bos(backend, "<s>")
    backend.add_tokens([AddedToken(END, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _without_added_bytes(backend: Backend, byte_tokens: list[str]) -> Backend:
    # The trainer makes byte tokens special; in a real vocabulary they are ordinary ones.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in byte_tokens]
    return Backend.from_str(json.dumps(state))


def _words() -> PreTrainedTokenizerFast:
    names = ["<s>", "<unk>", SEP, END, *"ABCDEFGH", *(f"w{i}" for i in range(20))]
    backend = Backend(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=[SEP, END],
    )


TOKENIZERS = {
    "byte_level": _byte_level(bos=True),
    "no_bos": _byte_level(bos=False),
    "llama_style": _llama_style(),
    "words": _words(),
}
TRAINED = ["byte_level", "no_bos", "llama_style"]


# --- The oracle: what the published code does, said again -------------------------------------


def oracle(
    name, prompt, reference, outputs, wrapper, *, limit, response, side="right", client=False
):
    """Return the final strings of all candidates, with one prompt budget for all of them."""
    tokenizer = TOKENIZERS[name]
    pieces = []
    for field in (prompt, reference, *outputs):
        if not isinstance(field, str):
            field = "\n".join(message["content"] for message in field)
        pieces.append(tokenizer(field)["input_ids"])
    for i in range(1, len(pieces)):
        excess = max(0, len(pieces[i]) - response)
        stop = len(pieces[i]) - excess
        pieces[i] = pieces[i][:stop] if side == "right" else pieces[i][excess:]
    room = min((limit - 4 - len(pieces[1]) - len(piece)) // 2 for piece in pieces[2:])
    pieces[0] = pieces[0][max(0, len(pieces[0]) - room) :]
    p, r, *candidates = (tokenizer.decode(ids, skip_special_tokens=True) for ids in pieces)

    def half(trajectory):
        newline = wrapper == "sft" and (client or len(trajectory) > 0)
        return f"{p}\n{trajectory}" if newline else f"{p}{trajectory}"

    return [f"{half(r)}{SEP}{half(candidate)}" for candidate in candidates]


def training_ids(name, glued):
    """Training appends the id; a server tokenizes the string with the token in it."""
    tokenizer = TOKENIZERS[name]
    return tokenizer(glued)["input_ids"] + [tokenizer.convert_tokens_to_ids(END)]


# Texts that form no marker, so that the published behaviour is the target. They cannot form one
# also not by chance where two of these meet; `marked` has whole special tokens, which must vanish.
WORDS = [
    "are",
    " the",
    " word",
    "r's",
    "\n",
    "\n\n",
    " ",
    "  ",
    "a[0] < 1",
    "|",
    "é",
    "北京",
    "🙂",
    "Q",
]
plain = st.lists(st.sampled_from(WORDS), max_size=25).map("".join)
messages = st.lists(plain.map(lambda text: {"role": "user", "content": text}), max_size=3)
fields = plain | messages
marked = st.lists(st.sampled_from([*WORDS, "<s>", "</s>"]), max_size=12).map("".join)
WRAPPERS = st.sampled_from(["sft", "pretrain"])


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=40, deadline=None)
@given(
    prompt=fields, reference=fields, output=fields, wrapper=WRAPPERS,
    response=st.integers(1, 20), slack=st.integers(0, 30), side=st.sampled_from(["right", "left"]),
)  # fmt: skip
def test_ids_are_those_of_the_published_code(
    name, prompt, reference, output, wrapper, response, slack, side
):
    limit = 2 * response + 6 + slack
    encoder = Encoder(
        TOKENIZERS[name], max_length=limit, max_response_length=response, cut_side=side
    )
    [glued] = oracle(
        name, prompt, reference, [output], wrapper, limit=limit, response=response, side=side
    )
    assert encoder.text(prompt, reference, output, wrapper) == glued + END
    assert encoder.encode(prompt, reference, output, wrapper) == training_ids(name, glued)


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=40, deadline=None)
@given(prompt=plain, reference=plain, chosen=plain, rejected=plain, wrapper=WRAPPERS)
def test_a_pair_shares_the_smaller_prompt_budget(
    name, prompt, reference, chosen, rejected, wrapper
):
    encoder = Encoder(TOKENIZERS[name], max_length=40, max_response_length=12)
    expected = oracle(name, prompt, reference, [chosen, rejected], wrapper, limit=40, response=12)
    assert encoder.encode_pair(prompt, reference, chosen, rejected, wrapper) == tuple(
        training_ids(name, glued) for glued in expected
    )


@pytest.mark.parametrize("name", ["byte_level", "llama_style"])
@settings(max_examples=40, deadline=None)
@given(prompt=marked, reference=marked, output=marked, wrapper=WRAPPERS)
def test_special_tokens_in_the_text_vanish(name, prompt, reference, output, wrapper):
    [glued] = oracle(name, prompt, reference, [output], wrapper, limit=16384, response=4096)
    assume("<s>" not in glued and "</s>" not in glued)
    assert Encoder(TOKENIZERS[name]).encode(prompt, reference, output, wrapper) == training_ids(
        name, glued
    )


PARTS = [
    "<",
    "|",
    "<|rew",
    "ard|>",
    SEP,
    "[UNUSED",
    "_TOKEN_130]",
    END,
    "<s>",
    "</",
    "s>",
    "x",
    "\n",
]
hostile = st.lists(st.sampled_from(PARTS), max_size=12).map("".join)


@pytest.mark.parametrize("name", ["byte_level", "no_bos", "llama_style", "words"])
@settings(max_examples=40, deadline=None)
@given(prompt=hostile, reference=hostile, output=hostile, wrapper=WRAPPERS, short=st.booleans())
def test_no_text_can_write_a_marker(name, prompt, reference, output, wrapper, short):
    limits = {"max_length": 30, "max_response_length": 8} if short else {}
    encoder = Encoder(TOKENIZERS[name], **limits)
    text = encoder.text(prompt, reference, output, wrapper)
    ids = encoder.encode(prompt, reference, output, wrapper)
    assert text.count(SEP) == 1 and text.count(END) == 1 and text.endswith(END)
    assert ids.index(encoder.reward_token_id) == len(ids) - 1
    tokenizer = TOKENIZERS[name]
    separator = tokenizer.convert_tokens_to_ids(SEP)
    if separator not in (None, tokenizer.unk_token_id):
        assert ids.count(separator) == 1
    assert tokenizer.eos_token_id is None or tokenizer.eos_token_id not in ids
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


# --- Cases worked out by hand -----------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_template_of_both_wrappers(name) -> None:
    encoder = Encoder(TOKENIZERS[name])
    assert encoder.text("p", "r", "c") == f"p\nr{SEP}p\nc{END}"
    assert encoder.text("p", "r", "c", "pretrain") == f"pr{SEP}pc{END}"


def test_ids_of_whole_words() -> None:
    # <s> 0, <unk> 1, separator 2, reward 3, A 4, B 5, C 6; WhitespaceSplit eats the newline.
    assert Encoder(TOKENIZERS["words"]).encode("A", "B", "C") == [0, 4, 5, 2, 4, 6, 3]
    # Glued, "AB" and "AC" are one unknown word each.
    assert Encoder(TOKENIZERS["words"]).encode("A", "B", "C", "pretrain") == [0, 1, 2, 1, 3]


def test_long_pieces_keep_the_right_ends() -> None:
    # Words count 1 each and BOS 1 a piece. max_length 19 leaves 15.
    # Reference <s> A B C D E: 6 > 4, keeps <s> A B C. Candidate <s> F G: 3.
    # Prompt budget (15 - 4 - 3) // 2 = 4; <s> w0 .. w5 has 7 and keeps w2 w3 w4 w5.
    encoder = Encoder(TOKENIZERS["words"], max_length=19, max_response_length=4)
    fields = ("w0 w1 w2 w3 w4 w5", "A B C D E", "F G")
    expected = f"w2 w3 w4 w5\nA B C{SEP}w2 w3 w4 w5\nF G{END}"
    assert encoder.text(*fields) == expected
    assert encoder.report(*fields) == Encoded(
        ids=[0, 14, 15, 16, 17, 4, 5, 6, 2, 14, 15, 16, 17, 9, 10, 3],
        truncated_prompt=True,
        truncated_reference=True,
        truncated_output=False,
    )
    # "left" keeps the last 4 of the reference, which are without BOS: B C D E.
    left = Encoder(TOKENIZERS["words"], max_length=19, max_response_length=4, cut_side="left")
    assert left.text(*fields) == expected.replace("A B C", "B C D E")


def test_a_piece_of_exactly_its_limit_is_not_cut() -> None:
    # Reference and candidate <s> + 3 words: 4 each. Prompt (19 - 4 - 8) // 2 = 3: <s> w0 w1.
    encoder = Encoder(TOKENIZERS["words"], max_length=19, max_response_length=4)
    report = encoder.report("w0 w1", "A B C", "D E F")
    assert (report.truncated_prompt, report.truncated_reference, report.truncated_output) == (
        False, False, False,
    )  # fmt: skip
    assert encoder.text("w0 w1", "A B C", "D E F") == f"w0 w1\nA B C{SEP}w0 w1\nD E F{END}"
    assert encoder.report("w0 w1 w2", "A B C", "D E F").truncated_prompt
    assert encoder.report("w0", "A B C", "D E F G").truncated_output


def test_prompt_budget_of_a_group_is_the_smallest_or_each_its_own() -> None:
    # Reference <s> A: 2. Candidates <s> B: 2 and <s> B C D: 4. max_length 18 leaves 14.
    # Budgets (14 - 2 - 2) // 2 = 5 and (14 - 2 - 4) // 2 = 4; the prompt <s> w0 .. w4 has 6.
    encoder = Encoder(TOKENIZERS["words"], max_length=18, max_response_length=4)
    prompt, reference, outputs = "w0 w1 w2 w3 w4", "A", ["B", "B C D"]
    decode = TOKENIZERS["words"].decode
    shared = encoder.report_group(prompt, reference, outputs)
    assert [decode(report.ids) for report in shared] == [
        f"<s> w1 w2 w3 w4 A {SEP} w1 w2 w3 w4 B {END}",
        f"<s> w1 w2 w3 w4 A {SEP} w1 w2 w3 w4 B C D {END}",
    ]
    alone = encoder.report_group(prompt, reference, outputs, shared_prompt_budget=False)
    assert alone == [encoder.report(prompt, reference, output) for output in outputs]
    assert decode(alone[0].ids) == f"<s> w0 w1 w2 w3 w4 A {SEP} w0 w1 w2 w3 w4 B {END}"
    assert alone[1] == shared[1]
    assert encoder.report_group(prompt, reference, []) == []


def test_empty_trajectory_gets_no_newline_unless_the_client_is_followed() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert Encoder(tokenizer).text("p", "", "c") == f"p{SEP}p\nc{END}"
    assert Encoder(tokenizer).text("p", "r", []) == f"p\nr{SEP}p{END}"
    client = Encoder(tokenizer, empty="client")
    assert client.text("p", "", "c") == f"p\n{SEP}p\nc{END}"
    assert client.text("p", "", "c", "pretrain") == f"p{SEP}pc{END}"
    [glued] = oracle("byte_level", "p", "", [""], "sft", limit=99, response=9, client=True)
    assert client.encode("p", "", "") == training_ids("byte_level", glued)


@pytest.mark.parametrize("name", TRAINED)
def test_nested_markers_are_removed_to_the_last_layer(name) -> None:
    # Where the separator is special, decoding alone takes off the inner layer only: the published
    # code would glue "<|rew<|reward|>ard|>ok", and the reward model would read a separator in it.
    encoder = Encoder(TOKENIZERS[name])
    nested = "<|rew<|rew<|reward|>ard|>ard|>ok"
    assert encoder.text("p", nested, nested) == f"p\nok{SEP}p\nok{END}"
    assert encoder.encode("p", "r", nested) == encoder.encode("p", "r", "ok")
    reward = encoder.encode("p", "r", "[UNUSED_[UNUSED_TOKEN_130]TOKEN_130]ok")
    assert reward.index(encoder.reward_token_id) == len(reward) - 1


def test_a_marker_across_the_seam_of_prompt_and_trajectory_is_removed() -> None:
    encoder = Encoder(TOKENIZERS["byte_level"])
    assert encoder.text("p<|rew", "ard|>r", "ard|>c", "pretrain") == f"pr{SEP}pc{END}"


def test_other_special_tokens_cannot_be_nested_either() -> None:
    # Decoding takes `<s>` off and leaves `</s>`, which would end the text for the model.
    encoder = Encoder(TOKENIZERS["byte_level"])
    assert encoder.text("p", "r", "</<s>s>c") == f"p\nr{SEP}p\nc{END}"


def test_of_two_markers_that_end_alike_the_longer_one_is_removed() -> None:
    encoder = Encoder(TOKENIZERS["llama_style"], separator="130]")
    assert encoder.text("p", f"r{END}", "c", "pretrain") == f"pr130]pc{END}"


def test_deep_nesting_takes_one_pass() -> None:
    # 4000 layers in about 0.02 s; a pass for each layer takes minutes.
    encoder = Encoder(TOKENIZERS["words"])
    assert encoder._clean("<|rew" * 4000 + SEP + "ard|>" * 4000 + "A") == "A"


def test_merges_cross_the_seam() -> None:
    # " word" is one token of this vocabulary; the pieces " wor" and "d" do not hold it.
    tokenizer = TOKENIZERS["byte_level"]
    merged = tokenizer.convert_tokens_to_ids("Ġword")
    assert merged is not None
    assert merged not in tokenizer.encode(" wor") + tokenizer.encode("d")
    assert merged in Encoder(tokenizer).encode(" wor", "d", "c", "pretrain")


def test_each_piece_is_tokenized_once() -> None:
    class Counting:
        def __init__(self, inner):
            self.inner, self.seen = inner, []

        def encode(self, text, *, add_special_tokens=True):
            self.seen.append(text)
            return self.inner.encode(text, add_special_tokens=add_special_tokens)

        def decode(self, ids, *, skip_special_tokens=False):
            return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting(TOKENIZERS["words"])
    encoder = Encoder(tokenizer)
    tokenizer.seen.clear()
    encoder.report_group("A", "B", ["C", "D"])
    # The prompt, the reference, two candidates, and the two glued texts.
    assert tokenizer.seen[:4] == ["A", "B", "C", "D"]
    assert len(tokenizer.seen) == 6


def test_content_text_joins_messages_by_newline_and_parts_by_nothing() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]
    assert content_text(conversation) == "x\nab"
    assert content_text("as it is \n") == "as it is \n"
    assert content_text([]) == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected text or a list of messages, got NoneType"),
        ({"role": "user", "content": "x"}, "got dict"),
        (["x"], "a message needs a `content`"),
        ([{"role": "user"}], "a message needs a `content`"),
        ([{"role": "assistant", "content": None}], "a message needs a `content`"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a list of text parts"),
    ],
)
def test_a_field_without_text_is_refused(value, message) -> None:
    with pytest.raises(ValueError, match=message):
        content_text(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut_side": "middle"}, "cut_side must be one of right, left, got `middle`"),
        ({"empty": "never"}, "empty must be one of training, client, got `never`"),
        ({"separator": "\n"}, "visible"),
        ({"reward_token": SEP}, "different"),
        ({"reward_token": "[UNUSED_TOKEN_999]"}, r"`\[UNUSED_TOKEN_999\]` as one token"),
        ({"max_response_length": 0}, "max_response_length must be at least 1"),
        # 2 * 4096 + 4 reserved + 2, so that a prompt token fits beside two full responses.
        ({"max_length": 8197}, "it must be at least 8198"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(TOKENIZERS["byte_level"], **options)


def test_unknown_wrapper_is_refused() -> None:
    with pytest.raises(ValueError, match="wrapper must be one of sft, pretrain, got `chat`"):
        Encoder(TOKENIZERS["words"]).encode("A", "B", "C", "chat")


def test_a_tokenizer_that_ends_texts_with_eos_is_refused() -> None:
    # The reward is read at the last token, which would be `</s>`.
    tokenizer = _byte_level(bos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    with pytest.raises(ValueError, match="does not end a text with"):
        Encoder(tokenizer)


@pytest.mark.parametrize("marker", [SEP, END])
def test_a_marker_that_only_the_tokenizer_sees_is_refused(marker) -> None:
    class Lax:
        """Reads `%` in a whole input (and only there) as the marker."""

        def __init__(self, inner):
            self.inner, self.decode = inner, inner.decode

        def encode(self, text, *, add_special_tokens=True):
            return self.inner.encode(text.replace("%", marker) if text.endswith(END) else text)

    with pytest.raises(ValueError, match="remove it from the record"):
        Encoder(Lax(TOKENIZERS["byte_level"])).encode("p", "r", "100%")
