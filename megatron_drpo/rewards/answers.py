"""Reading final answers: one meaning for the many spellings of a number.

Ground truths come out of data sets (`$1,234.50`, `50%`, `1.5e-5`, `... #### 72`), responses out of boxes
(`\\$1{,}234.50`, `50\\%`, `1.5 \\times 10^{-5}`). math-verify parses neither a currency or a percent sign
nor a trailing full stop, and takes `1.5e-5` for 1.5 e - 5. Both sides go through `read_answer`.

Imports the standard library alone: the trainer looks at every ground truth before any worker does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

ABSOLUTE_TOLERANCE = Fraction(5, 10**7)
"""As math-verify, which rounds to six decimals; but see `same_number`."""
RELATIVE_TOLERANCE = Fraction(1, 1000)
MAX_LENGTH = 1000
"""Characters of a number; its powers of ten are limited alike, for what a policy writes is read too."""

_SYMBOLS = {
    "\u2212": "-",
    "\u00d7": "\\times ",
    "\u00b7": "\\cdot ",
    "\u03c0": "\\pi ",
    "\u221a": "\\sqrt ",
    "\u221e": "\\infty ",
    "\u00b0": "^\\circ ",
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u00bd": "\\frac{1}{2}",
    "\u00bc": "\\frac{1}{4}",
    "\u00be": "\\frac{3}{4}",
    **dict.fromkeys("\xa0\u2009\u202f", " "),
}
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_SUPERSCRIPTS: dict[str, str] = dict(zip(_RAISED, "0123456789+-", strict=True))
_SUPERSCRIPT = re.compile(f"[{_RAISED}]+")
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)"
_SPACE = r"(?:\s|\\[,;:! ]|~)"
_WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]+)\$\$",
        r"\$((?:[^$]|(?<=\\)\$)+)(?<!\\)\$",
        r"\\\(((?:(?!\\\().)+)\\\)",
        r"\\\[((?:(?!\\\[).)+)\\\]",
        r"\*\*([^*]+)\*\*",
        rf"{_TEXT}\{{([^{{}}]*\d[^{{}}]*)\}}",
    )
]
"""Around a whole answer."""
_INLINE_MATH = re.compile(r"(?<!\\)\$(?!\s)[^$]+(?<![\s\\])\$(?!\d)")
"""As pandoc tells mathematics from prices: no digit follows the closing dollar."""

_SIGN = r"(?:\\?\$|\u20ac|\u00a3|\u00a5|\u20b9|\\(?:text)?(?:pounds|sterling|euro|yen|dollar)(?![a-zA-Z]))"
_CODE = r"(?:USD|EUR|GBP|CAD|AUD|CHF|JPY|CNY|RMB|INR|HKD|SGD|NZD|Rs\.?)"
_WORD = r"(?:dollars?|cents?|euros?|pounds?|rupees?|yen|yuan|francs?|pesos?)"
_PREFIX = rf"(?:(?:(?:US|CA|AU|NZ|HK|[CAS])\s*)?{_SIGN}|\b{_CODE})"
_SUFFIX = rf"(?:{_SIGN}|(?:{_CODE}|{_WORD})(?![a-zA-Z]))"
_CURRENCY_BEFORE = re.compile(
    rf"(?<![a-zA-Z\\])(?:{_TEXT}\{{\s*{_PREFIX}\s*\}}|{_PREFIX}){_SPACE}*(?=[-+]?\.?\d)"
)
_CURRENCY_AFTER = re.compile(rf"(?<=\d){_SPACE}*(?:{_TEXT}\{{\s*{_SUFFIX}\s*\}}|{_SUFFIX})")

_PERCENT_WORD = r"(?:percent(?:age)?|per\s+cent|pct)"
_PERCENT = re.compile(
    rf"(?<=[\d}})]){_SPACE}*(?:\\?%|{_TEXT}\{{\s*(?:\\?%|{_PERCENT_WORD})\s*\}}|{_PERCENT_WORD})$",
    re.IGNORECASE,
)
_UNIT = re.compile(rf"{_SPACE}*(?:{_TEXT}\{{[^{{}}\d]*\}}(?:\^\{{?\d\}}?)?|\^\s*\{{?\s*\\circ\s*\}}?)$")

_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,(?:\\!)?|\\[,;:! ]|~| )(?=\d{3}(?!\d))")
_GROUPED = re.compile(rf"\d{{1,3}}(?:{_SEPARATOR.pattern}\d{{3}})+(?!\d)")
_POWER = r"10\s*\^\s*(?:\{\s*(?P<{0}>[-+]?\d+)\s*\}|(?P<{0}_bare>[-+]?\d+))"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:"
    r"(?P<mantissa>\d+\.?\d*|\.\d+)"
    rf"(?:\s*[eE]\s*(?P<e>[-+]?\d+)|\s*(?:\\times|\\cdot|\*|x)\s*{_POWER.replace('{0}', 'power')})?"
    rf"|{_POWER.replace('{0}', 'alone')}"
    r"|(?P<whole>\d+(?=\s*\\)|\d+\s(?=\s*\d))?\s*(?:"
    r"(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|\\[dtc]?frac\s*(?:\{\s*(?P<frac_top>\d+)\s*\}|(?P<digit_top>\d))\s*"
    r"(?:\{\s*(?P<frac_bottom>\d+)\s*\}|(?P<digit_bottom>\d))))"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a final answer says."""

    latex: str
    """Without currency, percent sign, separators of thousands and the like."""
    number: Fraction | None
    """Its value without the percent sign, if it is a plain number."""
    is_percent: bool


def read_ground_truth(text: str) -> Answer:
    """The answer in a ground truth: behind the last `####`, as in GSM8K, or in its last box, or all of it."""
    text = text.rpartition("####")[2]
    box = find_box(text)
    return read_answer(text if box is None else box)


def read_answer(text: str) -> Answer:
    """The meaning of an answer that stands alone."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{''.join(_SUPERSCRIPTS[power] for power in match[0])}}}", text)
    text = _unwrap("".join(_SYMBOLS.get(character, character) for character in text))
    if _INLINE_MATH.search(text):
        return Answer(text, None, False)
    text = _CURRENCY_AFTER.sub("", _CURRENCY_BEFORE.sub("", text))
    without_sign = _PERCENT.sub("", text)
    is_percent = without_sign != text
    number = _read_number(without_sign)
    return Answer(
        without_sign if number is None else number[0], None if number is None else number[1], is_percent
    )


def same_number(truth: Answer, response: Answer) -> bool:
    """Whether two plain numbers are the same answer.

    `x%` is the same as `x%`, as `x` (what "how many percent" asks for) and as its value, x / 100. Rounding
    may differ by half of the sixth decimal, and by a thousandth of the value where that is less: 1e-9 is not
    2e-9.
    """
    assert truth.number is not None
    assert response.number is not None
    expected = [truth.number]
    if truth.is_percent != response.is_percent:
        expected.append(truth.number / 100 if truth.is_percent else truth.number * 100)
    return any(
        abs(value - response.number) <= min(ABSOLUTE_TOLERANCE, abs(value) * RELATIVE_TOLERANCE)
        for value in expected
    )


def find_box(text: str) -> str | None:
    """The content of the last \\boxed{}; None if there is none, or if others are so near (70 characters) that
    they may be one answer together."""
    boxes = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not boxes:
        return None
    content, _ = _to_closing_brace(text, boxes[-1])
    if content is not None and len(boxes) > 1:
        other, end = _to_closing_brace(text, boxes[-2])
        if other != content and (other is None or boxes[-1] - end < 80):
            return None
    return content


def _to_closing_brace(text: str, start: int) -> tuple[str | None, int]:
    """What stands between an opening brace and the one that closes it, and where that is."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()], match.start()
    return None, len(text)


def _unwrap(text: str) -> str:
    """Without a full stop at the end and what surrounds all of it."""
    previous = None
    while text != previous:
        previous = text
        text = text.strip()
        if text.endswith(".") and not text.endswith((r"\.", "..")):
            text = text[:-1]
        for wrapper in _WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
    return text


def _read_number(text: str) -> tuple[str, Fraction] | None:
    """A plain number as LaTeX that math-verify understands, and its value."""
    if len(text) > MAX_LENGTH:
        return None
    text = _GROUPED.sub(lambda match: _SEPARATOR.sub("", match[0]), _UNIT.sub("", text)).strip()
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    sign = "-" if part["sign"] == "-" else ""
    top = part["top"] or part["frac_top"] or part["digit_top"]
    if top is not None:
        bottom = int(part["bottom"] or part["frac_bottom"] or part["digit_bottom"])
        if bottom == 0:
            return None
        value = int(part["whole"] or 0) + Fraction(int(top), bottom)
        latex = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    else:
        exponent = next((int(part[name]) for name in _EXPONENTS if part[name] is not None), 0)
        if abs(exponent) > MAX_LENGTH:
            return None
        decimal = Decimal(f"{part['mantissa'] or 1}e{exponent}")
        value = Fraction(decimal)
        latex = format(decimal, "f")
    if value.denominator == 1:
        latex = str(value.numerator)
    return sign + latex, -value if sign else value


_EXPONENTS = ("e", "power", "power_bare", "alone", "alone_bare")
