r"""Cleaning what a policy wrote: cut repetition loops and incomplete endings.

Both follow the data recipe of POLAR: a trajectory that falls into a loop is truncated at the loop,
not dropped, and an ending that the length limit cut is cut back to the last complete sentence.

    >>> clean("It rains.\n" + "Go on. " * 20, "length")
    ('It rains.\nGo on.', ['loop'])
"""

from __future__ import annotations

import re

# A text ends in a loop when its end is one unit over and over: at least 4 times (3 for units of
# at least 100 characters) and at least 100 characters in all. So a ruler of 80 dashes, a laugh or
# a chorus sung twice stay as they are.
MIN_REPEATS, MIN_REPEATS_LONG = 4, 3
LONG_UNIT_CHARS = 100
MIN_LOOP_CHARS = 100

_CLOSERS = "\"'\u201d\u2019\u00bb)\\]}*_`\u300d\u300f\u3011\uff09\u300b"
# Western ends need a space or the end of the text after them, so that 3.14 is none; CJK ones not.
_WESTERN = rf"[.!?\u2026]+[{_CLOSERS}]*(?=\s|$)"
_CJK = rf"[\u3002\uff01\uff1f\uff0e]+[{_CLOSERS}]*"
_SENTENCE_END = re.compile(f"{_WESTERN}|{_CJK}|(?<=\\S)(?=[ \t]*\n[ \t]*\n)")
_LIST_NUMBER = re.compile(r"(?:^|\n)[ \t]*\d{1,3}\.$")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def clean(text: str, finish_reason: str) -> tuple[str, list[str]]:
    """A policy's text without loop and incomplete ending.

    Args:
        text: What the policy wrote.
        finish_reason: `stop` if the policy ended it, `length` if the limit did.

    Returns:
        The text and what was done: `loop`, `incomplete` or nothing. A text cut at its loop does
        not end at the limit any more and is left so.
    """
    text, looped = cut_loop(text)
    if looped:
        return text, ["loop"]
    text, cut = cut_incomplete(text, finish_reason)
    return text, ["incomplete"] if cut else []


def cut_loop(text: str) -> tuple[str, bool]:
    """Truncate a text that ends in a repetition loop; the repeated unit is kept once.

    Time is linear in the length. The unit may be cut by the length limit at the text's very end.
    The cut falls on the first sentence end after one round of the loop, else on a space, else
    exactly after one unit.
    """
    found = _loop(text)
    if found is None:
        bare = text.rstrip()
        found = _loop(bare) if bare != text else None
        if found is None:
            return text, False
        text = bare
    start, period = found
    first, last = len(text[: start + period].rstrip()), start + 2 * period
    for match in _SENTENCE_END.finditer(text, max(first - 1, 0)):
        if match.end() >= last:
            break
        if match.end() >= first:
            return text[: match.end()], True
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

    A sentence ends at `. ! ? …` before a space, at the CJK full stops, or at a blank line. Where
    that would drop more than half of the text, or inside an open code fence, the last whole line
    counts; in a text without line breaks, the last whole word. A text that already ends with a
    sentence, or has no place to cut, stays as it is.
    """
    if finish_reason != "length":
        return text, False
    body = text.rstrip()
    after = text[len(body) :]
    in_code = len(_FENCE.findall(body)) % 2 == 1
    end = 0
    if not in_code:
        for match in _SENTENCE_END.finditer(body):
            if not _LIST_NUMBER.search(body, max(0, match.end() - 8), match.end()):
                end = match.end()
        if after.count("\n") > 1:
            end = len(body)
    if end * 2 < len(body):
        lines = len(body) if "\n" in after else len(body[: body.rfind("\n") + 1].rstrip())
        end = max(end, lines)
    if end == 0:
        end = len(body if after else re.sub(r"\s+\S+$", "", body))
    return (body[:end], True) if end < len(body) else (text, False)
