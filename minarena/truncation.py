"""--truncation middle: a row that is too long loses the middle of its parts, not its beginning.

    <prompt>: Why (snip 310 tokens) blue?\\n\\n<response_a>: The (snip 95 tokens) air.\\n\\n<response_b>: No.

The left cut removes the prompt and response_a before it touches response_b. Here both responses always keep
their beginning and their end, and a mark tells the model how much is missing. Reported to help by the 1st,
2nd and 12th of the WSDM Cup, the visible mark by the 12th:
https://www.kaggle.com/competitions/wsdm-cup-multilingual-chatbot-arena/discussion/567614

Everything here is counted in tokens of the ONE string that a row is; the tokenizer's offsets say which tokens
belong to which part. What it does not do: know a tokenizer. It sees ids, offsets (in characters) and the ids
of a mark.
"""

from collections.abc import Callable, Sequence

import numpy as np


def spans(pieces: Sequence[str], texts: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) in characters of each text in the string pieces[0] + texts[0] + pieces[1] + ..."""
    found, at = [], 0
    for piece, text in zip(pieces, texts, strict=False):
        found.append((at + len(piece), at + len(piece) + len(text)))
        at = found[-1][1]
    return found


def token_quotas(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens that each part may keep, together at most `room`, which is less than sum(lengths).

    In proportion to the lengths, but at least a sixth of the room for each part, or the whole part if it is
    shorter: strict proportion would leave nothing of a short answer beside a very long prompt. What a short
    part does not need goes to the long ones.
    """
    least = [min(n, room // 6) for n in lengths]
    short = set()
    while True:
        left = room - sum(least[i] for i in short)
        long = sum(n for i, n in enumerate(lengths) if i not in short)
        more = {i for i, n in enumerate(lengths) if i not in short and n * left < least[i] * long}
        if not more:
            return [least[i] if i in short else n * left // long for i, n in enumerate(lengths)]
        short |= more


def truncate_middle(
    ids: list[int],
    offsets: Sequence[tuple[int, int]],
    parts: Sequence[tuple[int, int]],
    room: int,
    mark: Callable[[int], list[int]],
) -> list[int]:
    """At most `room` of the row's ids. Each part is cut in its middle, where mark(n) says that n tokens are
    missing; the tokens outside the parts (the template's) all stay.

    offsets: (start, end) of each token, parts: of each part, in characters. Raises ValueError where the room
    is so small that a part would keep no text beside its mark.
    """
    starts, ends = np.array(offsets).T
    first = [int(np.searchsorted(starts, start)) for start, _ in parts]
    after = [
        max(lo, int(np.searchsorted(ends, end, "right"))) for lo, (_, end) in zip(first, parts, strict=True)
    ]
    lengths = [hi - lo for lo, hi in zip(first, after, strict=True)]
    fixed = len(ids) - sum(lengths)  # the template's tokens, and any that reaches over a seam
    least = fixed + 6 * (len(mark(len(ids))) + 2)
    if room < least:
        raise ValueError(f"--truncation middle: --max-length must be at least {least + 2} for this base")
    kept, at = [], 0
    for lo, hi, quota in zip(first, after, token_quotas(lengths, room - fixed), strict=True):
        kept += ids[at:lo] + truncate_part(ids, offsets, lo, hi, quota, mark)
        at = hi
    return kept + ids[at:]


def truncate_part(ids, offsets, lo: int, hi: int, quota: int, mark: Callable) -> list[int]:
    """Tokens lo..hi as they are, or their beginning, mark and end: `quota` tokens in all, mark included."""
    if quota >= hi - lo:
        return ids[lo:hi]
    text = quota - len(mark(hi - lo))
    i, j = lo + (text + 1) // 2, hi - text // 2
    while True:
        while lo < i and offsets[i][0] < offsets[i - 1][1]:  # do not cut inside a character of several tokens
            i -= 1
        while j < hi and offsets[j][0] < offsets[j - 1][1]:
            j += 1
        over = (i - lo) + len(mark(j - i)) + (hi - j) - quota
        if over <= 0 or (i == lo and j == hi):
            return ids[lo:i] + mark(j - i) + ids[j:hi]
        # some tokenizers merge digits: the mark of another number can have more tokens
        i, j = (i - 1, j) if i - lo >= hi - j else (i, j + 1)
