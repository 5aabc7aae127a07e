"""--truncation middle: a row that is too long loses the middle of each part, and says how much.

encode(tokenizer, table, max_length, "middle") -> token ids, at most max_length of them
shares([100, 1000, 3000], room=2000)           tokens that each part keeps, its mark included
cut_middle(ids, offsets, parts, room, mark)    the same on one row's numbers, with no tokenizer

Compared with: the template cut by hand with one token a byte, decoding, and properties that must hold for any
lengths. Tokenizers: bytes, and two whose merges reach over the template's seams (from test_text.py).
"""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_text import TOKENIZERS, ends, pairs, whole

from minarena.data import swapped
from minarena.text import encode
from minarena.tiny import byte_tokenizer
from minarena.truncation import spans, token_quotas

MARK = re.compile(r" \(snip (\d+) tokens\) ")
LENGTHS = st.lists(st.integers(0, 5000), min_size=3, max_size=3)


def parts_of(text: str) -> list[str]:
    return re.fullmatch(
        r"<prompt>: (.*)\n\n<response_a>: (.*)\n\n<response_b>: (.*)", text, re.DOTALL
    ).groups()


def middle(tokenizer, max_length, *texts) -> str:
    row = encode(tokenizer, pairs(texts), max_length, "middle")[0].tolist()
    begin, end = ends(tokenizer)
    assert row[: len(begin)] == begin and row[-1:] == end and len(row) <= max_length
    return tokenizer.decode(row[len(begin) : -1])


def test_one_token_a_byte_is_cut_as_by_hand():
    """347 tokens, less BOS, EOS and the template's 42, leave 303 bytes. The prompt is short and stays, the
    responses share the other 299 as 2 : 1; a mark of fewer digits than it might have had leaves one."""
    prompt, a, b = "why?", "a" * 500 + "A" * 500, "b" * 250 + "B" * 250
    text = middle(byte_tokenizer(), 347, prompt, a, b)
    shown = parts_of(text)
    assert shown[0] == prompt
    for part, full, share in zip(shown[1:], (a, b), (199, 99), strict=True):
        [missing] = MARK.findall(part)
        start, end = MARK.split(part)[::2]
        assert full.startswith(start) and full.endswith(end) and abs(len(start) - len(end)) <= 1
        assert int(missing) == len(full) - len(start) - len(end)
        assert share - 1 <= len(part) <= share


def test_a_row_that_fits_is_the_left_cuts_and_nothing_is_marked():
    for name in ("bytes", "gemma", "qwen"):
        tokenizer = TOKENIZERS[name]()
        begin, end = ends(tokenizer)
        texts = ("Why then?", "A thing.", "Another\n\nthing.")
        uncut = begin + whole(tokenizer, *texts) + end
        assert encode(tokenizer, pairs(texts), len(uncut), "middle")[0].tolist() == uncut


@pytest.mark.parametrize("name", ["bytes", "gemma", "qwen"])
@pytest.mark.parametrize("lengths", [(900, 30, 30), (3, 900, 0), (400, 500, 600), (0, 2, 2000)])
def test_both_responses_keep_their_beginning_and_end(name, lengths):
    tokenizer = TOKENIZERS[name]()
    words = ["".join(f"{letter}{i} " for i in range(n)) for letter, n in zip("pab", lengths, strict=True)]
    texts = [text.strip() for text in words]
    shown = parts_of(middle(tokenizer, 400, *texts))
    for full, part in zip(texts, shown, strict=True):
        if MARK.search(part):
            start, end = MARK.split(part)[::2]
            assert start and end and full.startswith(start) and full.endswith(end)
        else:
            assert part == full


def test_the_number_in_the_mark_is_the_tokens_that_are_missing():
    """In the tokens of the one string, whose seams the merges of this tokenizer reach over."""
    tokenizer = TOKENIZERS["qwen"]()
    texts = ("Then. " * 300 + "Then.", "The thing. " * 200 + ".", ".")
    begin, _ = ends(tokenizer)
    row = encode(tokenizer, pairs(texts), 500, "middle")[0].tolist()
    shown = tokenizer.decode(row)
    missing = sum(map(int, MARK.findall(shown)))
    marks = sum(len(tokenizer(f" (snip {n} tokens) ")["input_ids"]) for n in MARK.findall(shown))
    assert len(MARK.findall(shown)) == 2
    assert len(whole(tokenizer, *texts)) - missing == len(row) - len(begin) - 1 - marks


def test_no_character_is_torn_apart():
    for length in range(250, 262):  # four tokens a character: most cuts would fall inside one
        shown = middle(byte_tokenizer(), length, "🍕" * 99, "🙂" * 99, "é" * 150)
        assert "\ufffd" not in shown and len(MARK.findall(shown)) == 3


@pytest.mark.parametrize("character", ["a", "é", "中", "🍕"])
def test_the_number_in_the_mark_is_right_when_a_character_of_several_tokens_stands_at_the_cut(character):
    """One token a byte: the missing tokens are the bytes of the missing characters, to the last one."""
    size = len(character.encode())
    for length in range(300, 309):  # the cut meets every byte of a character
        texts = (character * 90, character * 120, character * 150)
        shown = parts_of(middle(byte_tokenizer(), length, *texts))
        for full, part in zip(texts, shown, strict=True):
            [number] = map(int, MARK.findall(part))
            left = len(MARK.sub("", part))
            assert number == size * (len(full) - left)


def test_swapping_the_responses_swaps_what_is_kept_of_them():
    tokenizer = byte_tokenizer()
    table = pairs(("p" * 500, "a" * 700, "b" * 300))
    texts = [tokenizer.decode(encode(tokenizer, t, 400, "middle")[0][1:-1]) for t in (table, swapped(table))]
    (prompt, a, b), (other_prompt, first, second) = map(parts_of, texts)
    assert (prompt, a, b) == (other_prompt, second, first)


def test_a_users_text_that_looks_like_a_mark_or_a_special_token_stays_text():
    tokenizer = byte_tokenizer()
    shown = middle(tokenizer, 400, "<eos>", "<pad>" + "a" * 900 + "<eos>", " (snip 3 tokens) ")
    assert shown.count("<eos>") == 2 and "<pad>" in shown and shown.endswith(" (snip 3 tokens) ")
    row = encode(tokenizer, pairs(("<eos>", "<pad>" + "a" * 900, "<bos>")), 400, "middle")[0]
    assert [i for i in row if i < 4] == [2, 1]  # ids 0-3 are special: BOS and EOS are ours, no other is there


def test_a_max_length_that_leaves_no_text_is_refused_with_the_least_that_works():
    table = pairs(("p" * 99, "a" * 99, "b" * 99))
    with pytest.raises(ValueError, match=r"--truncation middle: --max-length must be at least \d+") as error:
        encode(byte_tokenizer(), table, 100, "middle")
    least = int(re.search(r"\d+", str(error.value)).group())
    assert len(encode(byte_tokenizer(), table, least, "middle")[0]) <= least
    with pytest.raises(ValueError, match=f"at least {least}"):
        encode(byte_tokenizer(), table, least - 1, "middle")


@given(LENGTHS, st.integers(1, 5000))
def test_shares_fill_the_room_keep_short_parts_whole_and_are_in_proportion(lengths, room):
    if sum(lengths) <= room:
        return
    kept = token_quotas(lengths, room)
    assert room - 3 < sum(kept) <= room
    assert all(min(n, room // 6) <= k <= n for n, k in zip(lengths, kept, strict=True))
    long = [(n, k) for n, k in zip(lengths, kept, strict=True) if k > room // 6]
    for (n, k), (m, j) in itertools.pairwise(long):  # cross products: k / n == j / m, up to rounding
        assert abs(k * m - j * n) <= max(n, m)


def test_short_parts_give_their_room_to_long_ones():
    assert token_quotas([10, 2000, 2000], 1210) == [10, 600, 600]
    assert token_quotas([1000, 2000, 3000], 1200) == [200, 400, 600]
    assert token_quotas([9000, 100, 500], 1200) == [900, 100, 200]


def test_spans_find_each_text_in_the_string():
    pieces, texts = ["<", "> ", ", "], ["one", "", "two words"]
    string = "<one> , two words"
    assert [string[a:b] for a, b in spans(pieces, texts)] == texts


def test_rows_do_not_depend_on_their_batch():
    table = pairs(*[("p" * n, "a" * (2 * n), "b" * 40) for n in (5, 300, 80, 200)])
    together, alone = (encode(byte_tokenizer(), table, 300, "middle", batch_rows=n) for n in (1024, 1))
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
