"""Texts and the upstream gate's verdict on each, worked out by hand from its rules (contracts.md section 5).

A case is `(text, rule or None, byte offset or None, why)`; `GATE` goes through the whole gate (thinking
and white space stripped), `RULES` through `verify_output` alone, without stripping.
"""

from __future__ import annotations

Case = tuple[str, str | None, int | None, str]

_CODE = "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n"
_DEEP = "for a in b:\n    for c in a:\n        if c:\n            yield c\n"

RULES: tuple[Case, ...] = (
    # empty: Unicode's White_Space and nothing else counts as space
    ("", "empty", None, "no character"),
    (" \n\t\r\n", "empty", None, "ASCII spaces"),
    ("\u00a0\u2003\u3000\u0085\u2028", "empty", None, "no-break, em and ideographic space, NEL, line separator"),
    ("\x1c", None, None, "U+001C is no White_Space in Unicode, though Python's strip() takes it"),
    ("\u200b", None, None, "a zero-width space is no White_Space; one character is too short for the other rules"),
    (" " * 40, "empty", None, "empty comes before the fragment of four spaces"),
    (".", None, None, "one character that is no space"),
    # markers: in the order U+FFFD, [UNK], akunji, olumbia, wherever they stand
    ("The answer is \ufffd4.", "marker", 14, "14 ASCII bytes before U+FFFD"),
    ("[UNK]", "marker", 0, "the unknown token"),
    ("[unk]", None, None, "markers are matched with their case"),
    ("so akunji", "marker", 3, "3 bytes before it"),
    ("Columbia", "marker", 1, "'olumbia' is in Columbia: a marker anywhere in a word"),
    ("the District of Columbia", "marker", 17, "16 bytes, then C: an honest answer that the gate refuses"),
    ("COLUMBIA", None, None, "capitals are not the marker"),
    ("olumbia \ufffd", "marker", 8, "U+FFFD is looked for first, though it comes later"),
    ("é[UNK]", "marker", 2, "é is two bytes"),
    ("\ufffd" * 40, "marker", 0, "the marker decides; the share of U+FFFD is never asked"),
    ("你" * 20 + "\ufffd", "marker", 60, "a marker comes before non-ASCII; 20 characters of 3 bytes"),
    # non-ASCII: more than 60 %, from 16 characters
    (
        "你好世界天地玄黄宇宙洪荒日月盈",
        None,
        None,
        "15 characters are too few, though all are foreign",
    ),
    ("你好世界天地玄黄宇宙洪荒日月盈昃", "non-ascii", None, "16 characters, all foreign"),
    ("你好世界天地玄黄宇abcdefg", None, None, "9 of 16 = 56.25 %"),
    ("你好世界天地玄黄宇宙abcdef", "non-ascii", None, "10 of 16 = 62.5 %"),
    ("你好世界天地玄黄宇宙洪荒abcdefgh", None, None, "12 of 20 is exactly 60 %, not more"),
    ("你好世界天地玄黄宇宙洪荒日abcdefg", "non-ascii", None, "13 of 20 = 65 %"),
    ("你好世界天地玄黄宇宙洪荒日月盈abcdefghij", None, None, "15 of 25 is exactly 60 %"),
    ("你好世界天地玄黄宇宙洪荒日月盈昃abcdefghi", "non-ascii", None, "16 of 25 = 64 %"),
    ("Столица Франции Париж.", "non-ascii", None, "19 Cyrillic letters of 22 characters = 86 %: an honest answer"),
    ("Größenmaß übermütig süß", None, None, "German: few letters are foreign"),
    ("ëĸ» Ãĥ pÃ³Åº zwiÄħzku", None, None, "upstream's example of gibberish; 11 of 21 = 52 % pass its rule"),
    ("👩\u200d👩\u200d👧\u200d👦", None, None, "a family: 7 code points, 25 bytes, none of them three in a row"),
    ("😀😁😂🤣😃😄😅😆😉😊😋😎😍😘🥰😗", "non-ascii", None, "16 emoji"),
    ("\u0301" * 11 + "abcde", "non-ascii", None, "11 of 16 = 69 %; non-ASCII comes before the fragment"),
    ("你" * 16, "non-ascii", None, "non-ASCII comes before the fragment"),
    # fragments: bytes, three in a row, 4 to min(16, bytes / 3), from 12 bytes
    ("a" * 11, None, None, "11 bytes are too few"),
    ("a" * 12, "fragment", 0, "aaaa three times"),
    ("==========", None, None, "ten equals signs are 10 bytes"),
    ("============", "fragment", 0, "twelve are 'gibberish': a ruler is a false positive"),
    ("Title\n==========\n", None, None, "a ruler of ten in a longer text is still short of 12"),
    ("Title\n============\n", "fragment", 6, "a ruler of twelve; 6 bytes before it"),
    ("\ns\ns\ns\ns\ns", None, None, "10 bytes"),
    ("\ns\ns\ns\ns\ns\ns", "fragment", 0, "12 bytes: '\\ns\\ns' three times"),
    ("OK:\ns\ns\ns\ns\ns\ns", "fragment", 3, "the same after 3 bytes"),
    ("\ns\ns\ns\ns\ns\n", None, None, "11 bytes"),
    ("abc" * 4, None, None, "12 bytes of period 3: only f = 4 fits, and a period of 4 is not there"),
    ("abc" * 5, None, None, "15 bytes: f is at most 5, and the period 3 divides neither 4 nor 5"),
    ("abc" * 6, "fragment", 0, "18 bytes: f = 6 is a multiple of the period"),
    ("ab" * 6, "fragment", 0, "f = 4 is a multiple of the period 2"),
    ("abcd" * 3, "fragment", 0, "the shortest fragment, exactly three times"),
    ("abcd" * 2 + "abc", None, None, "one byte short of three times"),
    ("xabcdabcdabcd", "fragment", 1, "found from the second byte"),
    ("abcdeabcdeabcd", None, None, "14 bytes: f is at most 4"),
    ("abcde" * 3, "fragment", 0, "15 bytes: f = 5"),
    ("abcdefghijklmnop" * 3, "fragment", 0, "16 bytes three times: the longest fragment"),
    ("abcdefghijklmnopq" * 4, None, None, "a period of 17 is too long for the rule, however often it comes"),
    ("abcdefgh" * 6, "fragment", 0, "f = 8 is found first, 16 would do, too"),
    ("0123456789ABCDEF" * 3 + "aaaaaaaaaaaa", "fragment", 48, "the smallest f wins, though f = 16 begins earlier"),
    ("abcdabcd-abcd", None, None, "three times, but not in a row"),
    ("é" * 5, None, None, "5 characters are 10 bytes"),
    ("é" * 6, "fragment", 0, "6 characters are 12 bytes: two of them are a fragment"),
    ("你" * 4, None, None, "12 bytes of period 3, as abc four times"),
    ("你" * 6, "fragment", 0, "18 bytes: f = 6 is two characters"),
    ("😀😀😀", "fragment", 0, "three emoji of 4 bytes each"),
    ("ab😀😀😀", "fragment", 2, "2 bytes before the emoji"),
    ("ha ha ha ha ha ha", None, None, "17 bytes: f is at most 5, and the period 3 divides neither 4 nor 5"),
    ("ha ha ha ha ha ha ", "fragment", 0, "18 bytes: 'ha ha ' three times"),
    ("!!!!!!!!!!!!", "fragment", 0, "what a model of NaN logits says"),
    (_CODE, None, None, "at most 8 spaces in a row"),
    (_DEEP, "fragment", 42, "lines of 12, 16 and 14 bytes, then 12 spaces of indentation"),
    ("| a | b |\n|---|---|\n| 1 | 2 |", None, None, "a narrow table: '|---|---|' is not three times in a row"),
    ("| a | b | c |\n|---|---|---|\n", "fragment", 14, "a table of three columns: '|---' three times"),
    ("1.0000000000000", "fragment", 2, "13 zeros after '1.': 0000 three times"),
    ("1.00000000000", None, None, "11 zeros after the point"),
    # NUL comes after gibberish, expected last
    ("a\0b", "nul", 1, "one NUL"),
    ("é\0", "nul", 2, "é is two bytes"),
    ("\0" * 12, "fragment", 0, "twelve NUL bytes are a fragment first"),
    ("The capital of France is Paris.", None, None, "a plain answer"),
)

GATE: tuple[Case, ...] = (
    ("\ns\ns\ns\ns\ns\ns", None, None, "the gate trims the first line end, and 11 bytes are too few"),
    ("\ns\ns\ns\ns\ns\ns\ns", "fragment", 0, "13 bytes after trimming: 's\\ns\\n' three times"),
    ("            yield c", None, None, "indentation of the first line is trimmed away"),
    ("4            ", None, None, "spaces at the end are trimmed away"),
    ("\x1c4", None, None, "U+001C is not trimmed, and breaks no rule"),
    ("<think>" + "hm " * 9 + "</think>\n\n4", None, None, "a loop inside the thinking block is not judged"),
    ("<think>2 and 2</think>", "empty", None, "nothing but thinking"),
    ("<think>2 and 2 is", "empty", None, "thinking that does not end"),
    ("4<think>or is it", None, None, "an open block cuts the rest off"),
    ("a<think>b</think>c<think>d</think>e", None, None, "both blocks go: 'ace'"),
    ("</think>4<think>x</think>", None, None, "a stray end first: the open block cuts off, and '</think>4' stays"),
    ("<th<think></think>ink>x</think>4", None, None, "what is left forms a block again, which goes, too"),
    ("<THINK>\0</THINK>", "nul", 7, "tags are matched with their case"),
)

# (text, prompt, what is judged)
ECHOES: tuple[tuple[str, str | None, str], ...] = (
    ("What is 2+2? 4", "What is 2+2?", "4"),
    (" What is 2+2? 4", "What is 2+2?", "What is 2+2? 4"),
    ("What is 2+2?What is 2+2? 4", "What is 2+2?", "What is 2+2? 4"),
    ("what is 2+2? 4", "What is 2+2?", "what is 2+2? 4"),
    ("4", "", "4"),
    ("4", None, "4"),
    ("<think>a</think>b", "<think>", "a</think>b"),
)

# (text, expected substrings, passes)
EXPECTED: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("2 + 2 = 4", ("4",), True),
    ("It is 14.", ("4",), True),  # a substring, not a word
    ("four", ("4",), False),
    ("HELLO!", ("hello",), True),
    ("hi", ("Hello", "Hi"), True),
    ("anything", (), True),
    ("anything", ("",), True),  # the empty text occurs in every text
    ("STRASSE", ("straße",), False),  # lower case does not fold ß
    ("ΟΔΟΣ", ("\u03bf\u03b4\u03bf\u03c3",), False),  # at a word's end, sigma becomes U+03C2 and not U+03C3
    ("ΟΔΟΣ", ("\u03bf\u03b4\u03bf\u03c2",), True),
)
