r"""Cleaning what a policy wrote: cut repetition loops and incomplete endings, name refusals.

Loops and endings follow the data recipe of POLAR: a trajectory that falls into a loop is truncated
at the loop, not dropped, and an ending that the length limit cut is cut back to the last complete
sentence. Loops are found in characters: a loop of tokens is one of characters too, whatever the
tokenizer. A refusal is kept as it is.

    >>> clean("It rains.\n" + "Go on. " * 20, "length")
    ('It rains.\nGo on.', ['loop'])
"""

from __future__ import annotations

import regex as re

# What `clean` may say of a text.
MARKS = ("loop", "incomplete", "refusal")

# A text ends in a loop when its end is one unit over and over: at least 4 times (3 for units of
# at least 100 characters) and at least 100 characters in all. So a ruler of 80 dashes, a laugh or
# a chorus sung twice stay as they are.
MIN_REPEATS, MIN_REPEATS_LONG = 4, 3
LONG_UNIT_CHARS = 100
MIN_LOOP_CHARS = 100
# A text that says no in its first words and is longer has said something else as well.
MAX_REFUSAL_CHARS = 300

# What may stand between a sentence's mark and the next sentence: quotes, brackets, the marks of
# Markdown, a footnote, emoji.
_EMOJI = r"(?:\ ?\p{Extended_Pictographic}[\ufe0f\u200d\p{EMod}\p{Extended_Pictographic}]*)*"
_CLOSERS = (
    r"[\"'\u201c\u201d\u2019\u00bb)\]}*_`\u300d\u300f\u3011\uff09\u300b]*"
    r"(?:[\ \u00a0\u202f]\u00bb)?(?:\[\d+\])*" + _EMOJI
)
# Western ends need a space or the end of the text after them, so that 3.14 is none. Greek asks with
# a semicolon. The others end a sentence wherever they stand: Chinese and Japanese, then Arabic,
# Urdu, Armenian, the dandas of India, Tibetan, Burmese, Khmer and Ethiopic.
_WESTERN = rf"(?:[.!?\u2026]+|(?<=\p{{Greek}})[;\u037e]){_CLOSERS}(?=\s|$)"
_OTHER = (
    r"[\u3002\uff01\uff1f\uff0e\uff61\u061f\u06d4\u0589\u0964\u0965\u0f0d\u104b\u17d4\u1362\u1367]+"
    + _CLOSERS
)
_SENTENCE_END = re.compile(f"{_WESTERN}|{_OTHER}|(?<=\\S)(?=[ \t]*\n[ \t]*\n)")
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t]*\d{1,3}\.$")

# A full stop behind these ends no sentence. Behind initials and dotted abbreviations it does if a
# word follows that begins many sentences.
_NEVER = frozenset(
    "dr mr mrs ms mme mlle prof st gen sen rep gov capt lt col sgt rev mt fig eq sec vol vs cf "
    "e.g i.e approx co bzw z.b d.h u.a vgl ca nr sr sra dra srta ee sig ул им г т гг".split()
)
_COMPANY = frozenset(["inc", "ltd", "corp", "jr"])
_STARTERS = frozenset(
    "i it he she we they you the this that these those there then in on at but and so if when "
    "what how why who as for to its his her our their my no yes a an now here".split()
)
_WORD = re.compile(r"[\p{L}\d.]+\.$")
_BEFORE = re.compile(r"(\S+)\s+$")
_NEXT = re.compile(r"[\s\"'\u201c\u2018(\[*_]*([\p{L}\p{M}\d]+\.?)?")
_INITIAL = re.compile(r"\p{Lu}\.?")
_MONTH = re.compile(
    r"Januar|Februar|März|April|Mai|Juni|Juli|August|Septem|Oktober|Novem|Dezem|Jahrhundert|Jh"
)

_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_SPANS = re.compile(r"\$\$(?s:.*?)(?:\$\$|\Z)|`[^`\n]+(?:`|\Z)")  # formulas, code in a line
_ITEM = r"[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])(?:[ \t]|\Z)"
_ROWS = re.compile(rf"^(?:{_ITEM}.*\S|[ \t]*\|.*\|)(?=[ \t]*\n(?:{_ITEM}|[ \t]*\|))", re.MULTILINE)
# Lines that promise something: a heading, `...:`, a bare list mark, a ruler.
_PROMISE = re.compile(
    r"[ \t]*(?:\#{1,6}(?:[ \t].*)?|.*[:\uff1a]\**|[-*+]|\d{1,3}[.)]|(?:[-*_][ ]?){3,})"
)
_OPENS = re.compile(r".*[:{(\[,\\=][ \t]*|[ \t]*@[\w.]+|[ \t]*|[ \t]*(?:```|~~~).*")
_CODE_LINE = re.compile(
    r".*[;{}(\[][ \t]*$|[ \t]*(?:def|class|import|return|function|const|let|var|public|private"
    r"|static|package|using|\#include|SELECT|INSERT|from[ ]\w+[ ]import)\b"
    r"|[ \t]*[\w.\[\]]+[ ]*[-+*/|]?=[ ]*\S|[ \t]*[\w.]+\(.*\)[ \t]*$"
    r"|(?:[ ]{2}|\t)(?![ \t]*(?:[-*+\u2022]|\d+[.)]))"
)

_NO = (
    r"(?:(?:I'?m|I am) (?:so |very |really |truly )?sorry|Sorry|(?:My )?apologies|I apologi[sz]e|"
    r"Unfortunately)?[\s,.!;:\u2014-]*(?:but )?"
    r"(?:as an? (?:AI|artificial|large|language)[^.,]*, *)?"
    r"(?:but )?(?:I|we)(?:'m|'re| am| are| can| must| will| do| have to)?\s*"
    r"(?:cannot|can't|could not|couldn't|not able to|unable to|won't|should not"
    r"|shouldn't|must not|not|don't|decline to|decline)"
    r" (?:(?:feel comfortable|in good conscience|be able to|directly|really|currently|to)\s)*"
    r"(?:assist|help(?! but| the way| it| my)|provid|answer|fulfil|compl[yei]|respond|discuss"
    r"|do (?:that|this)|continu|engag|creat|generat|writ|rewrit|shar|support|giv|offer"
    r"|participat|satisf|process|recommend|endors|predict|determin|role-?play|promot|encourag)",
    r"(?:很?抱歉|对不起|對不起|不好意思|作为一个?(?:人工智能|AI|语言模型)|我(?=无法|不能)).{0,40}"
    r"(?:无法|無法|不能|不便|没办法).{0,12}(?:提供|回答|协助|協助|帮助|幫助|满足|生成|讨论|完成|处理)",
    r"(?:申し訳|すみません|ごめんなさい|恐れ入り).{0,60}(?:できません|できかね|しかねます)",
    r"(?:죄송|미안).{0,60}수 없",
    r"(?:(?:Es )?tut mir (?:sehr )?leid|Entschuldigung|Leider).{0,60}\b(?:kann|darf)\b"
    r".{0,40}nicht.{0,20}(?:helfen|beantworten|geben|erfüllen|unterstützen|weiterhelfen|bereitstellen)",
    r"(?:Je suis (?:vraiment )?désolée?|Désolée?|Je m'excuse|Malheureusement).{0,60}"
    r"(?:je ne peux pas|je ne suis pas en mesure|il m'est impossible)",
    r"(?:Lo siento|Lo lamento|Disculp[ae]|Perdón).{0,60}no (?:puedo|podré|me es posible)",
    r"(?:Desculpe|Sinto muito|Lamento|Peço desculpa).{0,60}não (?:posso|consigo|poderei)",
    r"(?:Mi dispiace|Spiacente|Mi scuso).{0,60}non (?:posso|sono in grado)",
    r"(?:Извините|Простите|К сожалению|Мне (?:очень )?жаль|Сожалею).{0,60}"
    r"не (?:могу|имею возможности)",
    r"(?:عذر|آسف|أعتذر|معذرة).{0,60}(?:لا أستطيع|لا يمكنني|لا أقدر)",
)
_REFUSAL = re.compile("|".join(_NO), re.IGNORECASE)


def clean(text: str, finish_reason: str) -> tuple[str, list[str]]:
    """A policy's text without loop and incomplete ending.

    Args:
        text: What the policy wrote.
        finish_reason: `stop` if the policy ended it, `length` if the limit did.

    Returns:
        The text and what was done, of `MARKS`: `loop`, `incomplete`, neither; and `refusal` for a
        text that is nothing but one. A text cut at its loop does not end at the limit any more and
        is left so.
    """
    text, looped = cut_loop(text)
    marks = ["loop"] if looped else []
    if not looped:
        text, cut = cut_incomplete(text, finish_reason)
        marks = ["incomplete"] if cut else []
    return text, [*marks, "refusal"] if is_refusal(text) else marks


def is_refusal(text: str) -> bool:
    """Whether a text is a refusal and nothing else, in one of eleven languages.

    It begins with one and has at most 300 characters. A rule of thumb, for counting.
    """
    text = text.strip()
    return len(text) <= MAX_REFUSAL_CHARS and bool(_REFUSAL.match(text.replace("\u2019", "'")))


def cut_loop(text: str) -> tuple[str, bool]:
    """Truncate a text that ends in a repetition loop; the repeated unit is kept once.

    Time is linear in the length. The unit may be cut by the length limit at the text's very end,
    within a character too. The cut falls on the first sentence end or line break after one round
    of the loop, else on a space, else exactly after one unit.
    """
    found = _loop(text)
    if found is None:
        bare = text.rstrip(" \t\r\n\f\v\ufffd")
        found = _loop(bare) if bare != text else None
        if found is None:
            return text, False
        text = bare
    start, period = found
    first, last = len(text[: start + period].rstrip()), start + 2 * period
    line = text.find("\n", first, last)
    for match in _SENTENCE_END.finditer(text, max(first - 1, 0)):
        if match.end() >= (last if line < 0 else line):
            break
        if match.end() >= first:
            return text[: match.end()], True
    if line >= 0:
        return text[:line], True
    for end in range(first, last):
        if text[end].isspace():
            return text[:end], True
    return text[: start + period], True


def _loop(text: str) -> tuple[int, int] | None:
    """Start and period of the loop at a text's end: the shortest period that passes.

    With the text reversed, the Z value at p is how far the text goes on being periodic with p.
    """
    reverse = text[::-1]
    length = len(reverse)
    if length < MIN_LOOP_CHARS:
        return None
    z = [0] * length
    left = right = 0
    for i in range(1, length // MIN_REPEATS_LONG + 1):
        match = min(right - i, z[i - left]) if i < right else 0
        while i + match < length and reverse[match] == reverse[i + match]:
            match += 1
        z[i] = match
        if i + match > right:
            left, right = i, i + match
        covered = i + match
        enough = MIN_REPEATS_LONG if i >= LONG_UNIT_CHARS else MIN_REPEATS
        if covered >= MIN_LOOP_CHARS and covered // i >= enough:
            return length - covered, i
    return None


def cut_incomplete(text: str, finish_reason: str) -> tuple[str, bool]:
    r"""Cut a text that the length limit ended back to its last complete sentence.

    A sentence ends at `. ! ? …` before a space, at the marks of other scripts, or at a blank line;
    not at abbreviations and initials, nor within code or a formula. The item of a list before the
    next item and the row of a table are whole as well. Where that would drop more than half of the
    text, the last whole line counts; in a text without line breaks, the last whole word. In code,
    with a fence or without, the last whole line counts that opens nothing. A heading, or a line
    that ends in a colon, does not stay behind alone. A text that already ends with a sentence, or
    has no place to cut, stays as it is.
    """
    if finish_reason != "length":
        return text, False
    whole = text.rstrip("\ufffd")  # half a character
    body = whole.rstrip()
    after = whole[len(body) :]
    fences = [match.start() for match in _FENCE.finditer(body)]
    lines = len(body) if "\n" in after else len(body[: body.rfind("\n") + 1].rstrip())
    end = 0
    if len(fences) % 2 == 1:
        end = _trim(body, lines, _OPENS, fences[-1])
        end = end or _trim(body, len(body[: fences[-1]].rstrip()), _PROMISE)
    elif not fences and _is_code(body):
        end = _trim(body, lines, _OPENS)
    if not end:
        end = _prose_end(body, fences)
        if after.count("\n") > 1:
            end = len(body)
        if end * 2 < len(body):
            end = max(end, lines)
        end = _trim(body, end, _PROMISE) or end
    if end == 0:
        end = len(body if after else re.sub(r"\s+\S+$", "", body))
    if end < len(body):
        return body[:end], True
    return (whole, True) if whole != text else (text, False)


def _prose_end(body: str, fences: list[int]) -> int:
    """Where the last sentence, item or row ends; 0 if none does.

    In a text whose sentences all begin in lower case, a mark before a small letter ends one.
    """
    closed = 0  # end of the last closing fence's line
    seen = body  # the same with code and formulas blacked out
    for opening, closing in zip(fences[::2], fences[1::2], strict=False):
        closed = body.find("\n", closing) % (len(body) + 1)
        seen = seen[:opening] + "x" * (closed - opening) + seen[closed:]
    seen = _SPANS.sub(lambda match: "x" * len(match[0]), seen)
    found = list(_SENTENCE_END.finditer(seen))
    ends = (m.end() for strict in (True, False) for m in reversed(found) if _ends(seen, m, strict))
    rows = [match.end() for match in _ROWS.finditer(seen)]
    return max([next(ends, 0), closed, *rows[-1:]])


def _ends(body: str, match: re.Match[str], strict: bool) -> bool:
    """Whether a sentence's mark is one, and not part of an abbreviation, a number or a name."""
    start, end = match.span()
    if start == end or body[start] not in ".!?\u2026":
        return True
    following = _NEXT.match(body, end)
    word = (following and following[1]) or ""
    if strict and word[:1].islower():
        return False
    near = body[max(0, start - 40) : start + 1]
    token = _WORD.search(near)
    if body[start : start + 2].rstrip() != "." or token is None:
        return True
    if _LIST_NUMBER.search(near):
        return False
    name = token[0][:-1]
    if name[-1:].isdigit():
        return not _MONTH.match(word) and (bool(word) or end < len(body) or "\u3002" not in body)
    if name.lower() in _NEVER:
        return False
    if not word or word.lower() in _STARTERS:
        return True
    if name.lower() == "no":
        return not word[0].isdigit()
    if len(name) > 1:
        return "." not in name and name.lower() not in _COMPANY
    before = _BEFORE.search(near, 0, token.start())
    return not (
        before is None
        or before[1][0].isupper()
        or before[1].endswith(".")
        or bool(_INITIAL.fullmatch(word) and word.endswith("."))
    )


def _trim(body: str, end: int, dangling: re.Pattern[str], start: int = 0) -> int:
    """`end`, or before it the end of the last line that does not dangle; 0 if there is none.

    Of a line that announces something, the sentences before that stay.
    """
    while end > start:
        line = max(body.rfind("\n", 0, end) + 1, start)
        if not dangling.fullmatch(body, line, end):
            return end
        if dangling is _PROMISE:
            inner = _prose_end(body[line:end], [])
            if 0 < inner < end - line:
                return line + inner
        end = len(body[:line].rstrip())
    return 0


def _is_code(body: str) -> bool:
    """Whether a text without fences is a program: three lines or more, half of them look so."""
    lines = [line for line in body.split("\n") if line.strip()]
    return len(lines) > 2 and 2 * sum(bool(_CODE_LINE.match(line)) for line in lines) >= len(lines)
