"""The strings on which token ids are compared: deterministic, varied, in named kinds.

`corpus()` yields `(kind, text)`. Hand-written seeds cover what is known to go wrong; the rest is drawn
with a fixed seed from alphabets chosen to sit on the borders of the pre-tokenizer's classes.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|vision_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "</s>",
    "<s>",
    "<unk>",
    "[PAD151700]",
)

WHITE = (" ", "  ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2002", "\u2009", "\u2028")
WHITE += ("\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\x1c", "\x1f")

SCRIPTS = {
    "latin": "naïve façade Ærøskøbing Þingvellir Łódź žluťoučký kůň Straße ẞ ﬁne ŉ Ǆǅǆ İstanbul ısı",
    "greek-cyrillic": "Οὐχὶ ταὐτὰ παρίσταταί Съешь же ещё этих мягких французских булок Ѣ ҈ ѱ",
    "cjk": "这是一个测试。日本語のテキスト、カタカナとﾊﾝｶｸ 𠮷野家で𩸽 한국어 텍스트입니다 ㄱㄴㄷ 々〆〇ヽ㍿㈱",
    "arabic-hebrew": "السلام عليكم ورحمة الله ٠١٢٣٤ ۱۲۳ שָׁלוֹם עוֹלָם ﷽ ـــ لا",
    "indic": "नमस्ते दुनिया क्षत्रिय বাংলা ভাষা தமிழ் మొఱ్ఱ ಕನ್ನಡ മലയാളം ਪੰਜਾਬੀ ગુજરાતી ০১২৩ १२३",
    "south-east-asian": "สวัสดีชาวโลก ๑๒๓ ພາສາລາວ មនុស្សទាំងអស់ မြန်မာဘာသာ བོད་སྐད",
    "caucasian-ethiopic": "ქართული ენა Ⴀ Ა հայերեն և አማርኛ ፩፪፫ ᚠᚢᚦ ᐃᓄᒃᑎᑐᑦ ᏣᎳᎩ",
    "emoji": "👋🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🏴󠁧󠁢󠁳󠁣󠁴󠁿 1️⃣ ❤️‍🔥 🇩🇪🇯🇵 👨🏿‍🚀 ☺︎ ☺️ 🫠🫨 ©️ ™ 🧑🏻‍❤️‍💋‍🧑🏾",
    "mathematics": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β ⟹ 𝔸𝕓𝒞 ½ ⅔ ² ³ ₄ ①②③ ⅷ Ⅻ ∞ ∑ᵢ √2 ≈ 1.41421",
    "combining": (
        "e\u0301 a\u030a\u0323 Z\u0351\u036b\u0343 o\u0308\u0304 \u0301lone x\u20dd"
        " \u1112\u1161\u11ab ね\u3099 ﬀ \u212b Å"
    ),
    "unassigned-private": (
        "\ue000\uf8ff \U000f0000\U0010fffd \u0378\u05ff \ufdd0\uffff\U0001fffe \ufffd \ufff9\ufffa\ufffb"
    ),
    "unicode-16": "\u1c89\ua7cb\U000105c0 \U00010d40\U00010d4a \U00013460 \U0001ccf0\U0001e5f1 a\ua7cbb 1\U00010d411",
    "control": (
        "a\x00b \x01\x02 \x07bell \x1b[31mred\x1b[0m \x7f \x80\x9f\xad soft\u00adhyphen \u200e\u200f\u202a\u202c"
    ),
    "old": "𒀀𒁹 𓀀𓂀 𐎀𐎁 𐌰𐌱 𐤀𐤁 𝟘𝟙𝟚 𝍠 𐄇 ꩐ 𑁦 𞥐",
}

CODE = (
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\r\n",
    'fn main() -> Result<(), Box<dyn Error>> {\n    println!("{:?}", x?);\n    Ok(())\n}',
    "SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.uid=u.id GROUP BY 1 HAVING n>=10;",
    "#include <vector>\ntemplate<typename T, std::size_t N = 0x7fff>\nstruct A : public B<T>::C { };",
    '{"a": [1, 2.5e-3, null, true], "b\\u00e9": "\\n\\t\\"", "c": {}}',
    "$ curl -sSL https://example.org/a?b=c&d=%20e#f | sudo -E bash -s -- --yes 2>/dev/null || exit $?",
    "@media (max-width:600px){.a>.b::after{content:'\\201C';margin:-1px auto!important}}",
    "<div class='x' data-y=\"1\"><!-- comment --><p>&nbsp;&lt;tag&gt;</p><br/></div>",
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\\.[a-z]+)*)@((\\d{1,3}\\.){3}\\d{1,3}|\\[.*?\\])$",
    "\\begin{align}\n  \\frac{\\partial L}{\\partial w_{ij}} &= \\sum_{k} \\delta_k\\\\\n\\end{align}",
    "lambda *a, **k: (yield from a) or [*map(str.strip, k)][::-1]  # noqa: E731",
    "MOV EAX, [EBX+4*ECX-0x10]\nJNZ .L1\n0xDEADBEEF 0b1010 0o777 1_000_000 1e-7f",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-old\n+new\n \n\\ No newline at end of file\n",
)

CONTRACTIONS = (
    "I'm you're he's they've we'll she'd don't I'M YOU'RE HE'S THEY'VE WE'LL SHE'D DON'T",
    "'s't're've'm'll'd 'S'T'RE'VE'M'LL'D 'sx 'rE 'Ve 'lL ' s '' ''s 'x '1 '\n's",
    "l'été d'Artagnan O'Neill rock'n'roll '90s 'tis y'all'd've",
    "it’s they’re ‘quoted’ ʼs ＇s",
    "'ſ 'ſt a'ſ 'K K's 'İ 'ſs",
)

NUMBERS = (
    "0 1 12 123 1234 12345 1234567890123456789012345678901234567890",
    "3.14159 -2.5e+10 1,234,567.89 0x1F 1/2 50% $9.99 €1.000,00 10^6 v1.2.3-rc4",
    "192.168.0.1 2026-11-23T05:44:16Z +49 (0)30 123456 ISBN 978-3-16-148410-0",
    "①1²₂½Ⅷ一二三٣۳३๓𝟛",
)

PLAIN = (
    "",
    " ",
    "a",
    "What is 2+2?",
    "What is 2+2? The answer is ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "The quick brown fox jumps over the lazy dog. ",
    "Hello,world!how are you?I am fine;thanks:bye",
    "ALLCAPS CamelCase snake_case kebab-case SCREAMING_SNAKE iPhone eBay",
)


def _specials(draw: random.Random) -> Iterator[str]:
    for token in SPECIALS:
        yield token
        yield f"{token}{token}"
        yield f"a{token}b"
        yield f" {token} \n{token}\n"
        yield f"<|im_start|>system\n{token}<|im_end|>"
        yield f"{token[:1]}{token}{token[-1:]}"
        for cut in range(1, len(token), 3):  # half-typed
            yield token[:cut]
            yield token[cut:]
            yield f"say {token[:cut]} {token[cut:]}"
        yield token.upper()
        yield token.replace("|", "｜").replace("_", " ")
        yield token.replace("|", "||")
        yield f"\\{token}'{token}\"{token}`"
    for _ in range(250):
        pieces = [
            draw.choice((*SPECIALS, "<", "|", ">", "<|", "|>", "im_start", " ", "\n", "x", "é")) for _ in range(9)
        ]
        yield "".join(pieces)


def _whitespace(draw: random.Random) -> Iterator[str]:
    for white in WHITE:
        for count in (1, 2, 3, 7, 64):
            yield white * count
            yield f"a{white * count}b"
            yield f"{white * count}."
            yield f"x{white * count}"
    for _ in range(300):
        pieces = [draw.choice((*WHITE, *WHITE, "a", "é", "7", ".", "中", "'s")) for _ in range(draw.randrange(2, 14))]
        yield "".join(pieces)


def _borders(draw: random.Random) -> Iterator[str]:
    """Short strings over one alphabet of class representatives: the pre-tokenizer's own corner cases."""
    alphabet = list("aZ09 '\"\n\r\t.,!(-sStTdDmMlLvVeErR") + list(
        "é中ー़́²Ⅷ٣\xa0\u3000\u200d\u2028👍🏽\x00\x7f\u0378\ue000"
    )
    alphabet += ["'re", "'LL", "  ", "\r\n", "ſ", "K", "\u1c89", "\U00010d40"]
    for _ in range(700):
        yield "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 24)))


def _code_points(draw: random.Random) -> Iterator[str]:
    """Any assigned or unassigned code points, in runs and between letters, digits and spaces."""
    planes = ((0x20, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))
    for _ in range(300):
        first, last = draw.choice(planes)
        yield "".join(
            chr(draw.randrange(first, last)) + draw.choice(("", "", " ", "a", "1", "\n", "'s"))
            for _ in range(draw.randrange(1, 12))
        )


def _long() -> Iterator[str]:
    for unit in ("a", " ", "\n", "=", "0", "é", "中", "👍", "ab ", "\t\n", "ha", "-+", "<", "<|", "e\u0301", "\u200d"):
        yield unit * 3000
    yield "a" * 999 + " " * 999 + "\n" * 999 + "!" * 999
    yield " ".join(str(number) for number in range(900))


def _windows(draw: random.Random, text: str, count: int) -> Iterator[str]:
    for _ in range(count):
        start = draw.randrange(len(text))
        yield text[start : start + draw.randrange(1, 24)]


def corpus() -> list[tuple[str, str]]:
    """All strings with their kinds, the same on every machine."""
    draw = random.Random(20261123)
    found = [("plain", text) for text in PLAIN]
    found += [("contraction", text) for text in CONTRACTIONS]
    found += [("number", text) for text in NUMBERS]
    for text in CODE:
        found.append(("code", text))
        found += [("code", window) for window in _windows(draw, text, 18)]
        found.append(("code", text.replace("\n", "\r\n").replace("    ", "\t")))
    for name, text in SCRIPTS.items():
        found.append((name, text))
        found += [(name, word) for word in text.split(" ")]
        found += [(name, window) for window in _windows(draw, text, 18)]
        found += [(name, unicodedata.normalize(form, text)) for form in ("NFD", "NFC", "NFKD")]
        found.append((name, text.replace(" ", "")))
        found.append((name, text[::-1]))
    found += [("special", text) for text in _specials(draw)]
    found += [("whitespace", text) for text in _whitespace(draw)]
    found += [("border", text) for text in _borders(draw)]
    found += [("code point", text) for text in _code_points(draw)]
    found += [("long", text) for text in _long()]
    mixed = [text for kind, text in found if kind not in ("long", "whitespace")]
    found += [("mixed", " ".join(draw.sample(mixed, 4))) for _ in range(200)]
    return list(dict.fromkeys(found))
