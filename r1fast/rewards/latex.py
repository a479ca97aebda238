r"""LaTeX and plain notation to tokens: one spelling for every way to write the same thing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from r1fast.protocol import boxes

MAX_LENGTH = 2000  # characters of an answer
MAX_DIGITS = 1000  # of one number

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp gcd lcm max "
    "min det arg deg dim ker floor ceil Re Im".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon "
    "Phi Psi Omega ell hbar".split()
)
_UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ",
    "∗": "*", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ",
    "°": r"^\circ ", "º": r"^\circ ", "′": "'", "’": "'", "²": "^2", "³": "^3", "½": " 1/2",
    "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "φ": r"\phi ", "λ": r"\lambda ", "ω": r"\omega ",
    "∅": r"\emptyset ", "，": ",", "。": ".", "（": "(", "）": ")", "：": ":", "％": "%",
    "⟨": r"\langle ", "⟩": r"\rangle ", "€": "$", "£": "$", "¥": "$", "\u00a0": " ",
    "…": r"\ldots ", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "",
    "¢": r" \text{cents}", "\u2044": "/", "\u2009": " ", "\u202f": " ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
}  # fmt: skip
_UNICODE.update({chr(0xFF10 + d): str(d) for d in range(10)})  # full-width digits
_TABLE = str.maketrans(_UNICODE)
_ALIASES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<",
    "gt": ">", "ast": "*", "lbrace": "{", "rbrace": "}", "lvert": "|", "rvert": "|", "vert": "|",
    "lbrack": "[", "rbrack": "]", "mid": "|", "to": "rightarrow", "dots": "ldots", "cdots": "ldots",
    "degree": "circ", "infin": "infty", "varnothing": "emptyset", "colon": ":", "div": "/",
    "textdegree": "circ", "mathpi": "pi", "nicefrac": "frac", "sfrac": "frac", "xfrac": "frac",
}  # fmt: skip
_TEXT = frozenset(
    "text mbox textbf textrm textit textnormal textsf texttt mathrm mathbf mathit mathsf "
    "operatorname".split()
)
_BLANK = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits "
    "quad qquad hspace vspace phantom hfill nolimits rm bf it dollar".split()
)
# 0.1\overline{6}, 0.\bar 3, 0.\dot{3}
_REPEATING = re.compile(
    r"([0-9]{0,40})\.([0-9]{0,40})\\(?:overline|bar|dot|overbar)\s*(?:\{\s*([0-9]{1,40})\s*\}|([0-9]))"
    r"(?![0-9.\\])"
)
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_SCIENTIFIC = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*[xX]\s*(10\s*\^\s*\{?\s*[+-]?[0-9]+\s*\}?)")
# ]0, 1[ for (0, 1)
_OUTWARD = re.compile(r"([\[\]])([^\[\](){}]{1,80}[,;][^\[\](){}]{1,80})([\[\]])")
_ROW_GAP = re.compile(r"(?<=\\\\)\s*\[-?[0-9.]+(?:pt|em|ex|mm|cm)\]")  # \\[4pt]
_WRAPPING = re.compile(r"\\(?:text|textbf|textrm|mbox)\{([^{}\\]{2,})\}\Z")
_INFINITY = re.compile(r"([+-]?)\s*infinity", re.IGNORECASE)
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?|\\(.)", re.DOTALL)
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![0-9A-Za-z]))?")
_WORD = re.compile(r"[A-Za-z]+")
# 1,000 and 1 000
_GROUPS = re.compile(
    r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9]|,[0-9]|/)"
)
_MARKED_GROUPS = re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}\s*|\\,)(?=[0-9]{3}(?![0-9]))")  # 1{,}000
ANSWER_PREFIX = re.compile(
    r"^(?:(?:therefore|thus|so|hence)?,?\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|=|:)\s*:?"
    r"|(?:die|la|le|a)?\s*(?:endgültige\s+)?(?:antwort|réponse|respuesta|risposta|resposta)(?:\s+finale?)?"
    r"\s*(?:ist|lautet|est|es|è|é|=|:)\s*:?|ответ\s*[:=—]"  # the languages of MGSM, and their neighbours
    r"|(?:最终|所以|因此)?答案\s*(?:是|为|為|[:：=])\s*[:：]?|答え\s*(?:は|[:：])|คำตอบ\s*(?:คือ|:)|jibu\s*(?:ni|:)"
    r"|উত্তর\s*(?:হল|হলো|হচ্ছে|:)|సమాధానం\s*[:=]?)",
    re.IGNORECASE,
)


_PLAIN = re.compile(
    r"\s*\$?\s*([+-]?)([0-9]{1,40}|[0-9]{1,3}(?:,[0-9]{3}){1,12})(?:\.([0-9]{0,40}))?\s*\$?\s*"
)


def plain_number(text: str) -> tuple[str, str, str] | None:
    """(sign, digits, decimals) of an integer or a decimal, equal for equal numbers; else None."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    sign, whole, decimals = match.groups()
    whole, decimals = whole.replace(",", "").lstrip("0"), (decimals or "").rstrip("0")
    return ("-" if sign == "-" and (whole or decimals) else ""), whole, decimals


class Unreadable(ValueError):
    """The text is no answer this grammar knows."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # number | word | text | command | mark
    value: str
    spaced: bool = False  # white space stands before it


def clean(text: str) -> str:
    r"""One spelling: no dollars, spacing commands, \left, \dfrac; thousands without commas."""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise Unreadable(f"an answer of {len(text)} characters; at most {MAX_LENGTH} are read")
    if not text.isascii():
        text = text.translate(_TABLE)
    if "\\boxed" in text or "\\fbox" in text:
        inner = boxes(text)
        if len(inner) == 1 and re.fullmatch(r"\$*\s*\\(?:boxed|fbox).*", text, re.DOTALL):
            return clean(inner[0]) if len(inner[0]) < len(text) else inner[0]
        raise Unreadable("several boxes, or text around a box")
    if "\\\\" in text and "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z(){}\[\]%$,!;])", r"\\", text)  # escaped twice
    text = text.replace(r"\$", "").replace("$", "").replace(r"\%", "%").replace(r"\_", "_")
    if "\\\\" in text:
        text = _ROW_GAP.sub("", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = _MARKED_GROUPS.sub("", text).replace(r"\!", "")
    text = re.sub(r"(\d)\s*\^\s*\{?\s*\\circ\s*\}?", r"\1\\circ ", text)
    text = text.strip()
    while text[-1:] in (".", ",", ";") and not text.endswith("\\,"):
        text = text[:-1].rstrip()
    text = ANSWER_PREFIX.sub("", text, count=1).lstrip("= ").strip()
    if not (text.startswith("{") or any(bracket in text for bracket in ("(", "[", r"\{"))):
        # "1,234" is a number; "(1,234)" is a point and "100, 200" a list
        text = _GROUPS.sub(lambda m: m[0].replace(",", "").replace(" ", ""), text)
    return _respelled(text)


def _respelled(text: str) -> str:
    """Rarer notation in the one that the grammar reads."""
    if text.startswith("~"):
        raise Unreadable("about a value is no value")
    if "\\over" in text:
        for _ in range(8):
            text, count = _OVER.subn(r"\\frac{\1}{\2}", text)
            if not count:
                break
    if text[:1].isdigit() or text[:1] in ("+", "-"):
        if match := _SCIENTIFIC.fullmatch(text):
            text = rf"{match[1]}\times {match[2]}"
    if "infinity" in text.casefold() and (match := _INFINITY.fullmatch(text)):
        text = match[1] + r"\infty"
    if "[" in text and "]" in text and (text.startswith("]") or text.endswith("[")):
        parts = re.split(r"(\\cup(?![A-Za-z]))", text)
        text = " ".join(_OUTWARD.sub(_inward, part, count=1) for part in parts)
    return text


def _inward(match: re.Match) -> str:
    opening, inside, closing = match.groups()
    return ("(" if opening == "]" else "[") + inside + (")" if closing == "[" else "]")


def repeating_decimal(whole: str, start: str, period: str) -> Fraction:
    """0.1\\overline{6}: ("0", "1", "6") -> 1/6."""
    scale = 10 ** len(start)
    fixed = Fraction(int((whole + start) or "0"), scale)
    return fixed + Fraction(int(period), scale * (10 ** len(period) - 1))


def tokenize(text: str) -> list[Token]:
    """Tokens of a cleaned text."""
    tokens: list[Token] = []
    at, spaced = 0, False
    while at < len(text):
        c = text[at]
        if c.isspace() or c == "~":
            at, spaced = at + 1, True
            continue
        if (c.isdigit() or c == ".") and (match := _REPEATING.match(text, at)):
            value = repeating_decimal(match[1], match[2], match[3] or match[4])
            tokens.append(Token("number", str(value), spaced))
            at = match.end()
        elif match := _NUMBER.match(text, at):
            if len(match[0]) > MAX_DIGITS:
                raise Unreadable(f"a number of {len(match[0])} digits; at most {MAX_DIGITS}")
            tokens.append(Token("number", match[0], spaced))
            at = match.end()
        elif match := _WORD.match(text, at):
            tokens.append(Token("word", match[0], spaced))
            at = match.end()
        elif c == "\\":
            match = _COMMAND.match(text, at)
            if match is None:
                raise Unreadable("a lone backslash")
            at = match.end()
            name = match[1]
            if name is None and match[2] in "!,;: \n":
                spaced = True
                continue
            if name is None:
                tokens.append(Token("mark", "\\" + match[2], spaced))
            elif name in _TEXT or name.startswith("math"):
                content, at = _group(text, at)
                kind = "text" if name in _TEXT else "command"
                if content.strip() in ("%", "\\%"):
                    kind, content = "mark", "%"
                elif name == "operatorname" and content in FUNCTIONS:
                    kind = "word"
                value = f"{name}{{{content}}}" if kind == "command" else content
                tokens.append(Token(kind, value, spaced))
            elif name in ("begin", "end"):
                content, at = _group(text, at)
                tokens.append(Token("command", f"{name}:{content}", spaced))
            elif name in _BLANK:
                if name in ("left", "right") and text[at : at + 1] == ".":
                    at += 1
                if name in ("hspace", "vspace", "phantom"):
                    _, at = _group(text, at)
                spaced = True
                continue
            else:
                name = _ALIASES.get(name, name)
                kind = "command" if name.isalpha() else "mark"
                value = name if kind == "command" or name not in "{}" else "\\" + name
                tokens.append(Token(kind, value, spaced))
        elif c == "*" and text[at : at + 2] == "**":
            tokens.append(Token("mark", "^", spaced))
            at += 2
        elif c in "<>!=" and text[at + 1 : at + 2] == "=":
            name = {"<": "le", ">": "ge", "!": "ne", "=": "="}[c]
            tokens.append(Token("mark" if name == "=" else "command", name, spaced))
            at += 2
        else:
            tokens.append(Token("mark", c, spaced))
            at += 1
        spaced = False
    return tokens


def _group(text: str, at: int) -> tuple[str, int]:
    """The content of the {group} at `at` and the index behind it; one character without braces."""
    while at < len(text) and text[at].isspace():
        at += 1
    if text[at : at + 1] != "{":
        return text[at : at + 1], at + 1
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[at + 1 : i], i + 1
    raise Unreadable("a brace that never closes")


def squeeze(text: str) -> str:
    """A spelling for comparing texts that are no typed answers."""
    currency = (
        "" if text.isascii() else "".join(c for c in text if c in "€£¥")
    )  # `clean` drops them
    try:
        text = clean(text)
    except Unreadable:
        text = text.strip()
    text = re.sub(r"\s*\\(?:left|right|displaystyle)(?![A-Za-z])\s*", " ", text).strip()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _WRAPPING.sub(r"\1", text)
    return currency + re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", text)  # "1 2" is not 12


def is_balanced(text: str) -> bool:
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return False
    return depth == 0 and not re.search(r"(?<!\\)(?:\\\\)*\\$", text)


# operators that stand for work not done, and what math-verify takes for a product of letters or leaves out; two of
# these are compared as text only
_UNFINISHED = frozenset(
    "int iint iiint oint sum prod lim limsup liminf bigcup bigcap forall exists ldots vdots ddots "
    "partial nabla angle measuredangle triangle parallel perp top dagger gcd lcm max min deg dim ker det "
    "arg Re Im".split()
)
_ARGUMENTS = ("frac", "binom", "_")
_RELATIONS = frozenset(("=", "<", ">", "le", "ge", "ne"))
MAX_SYMBOLIC_LENGTH = 500
MAX_SYMBOLIC_DIGITS = 60
MAX_SYMBOLIC_EXPONENT = 200
MAX_SYMBOLIC_DEPTH = 12
MAX_SYMBOLIC_NESTED = 3  # functions of functions: the LaTeX parser doubles its time with each


def is_symbolic(text: str) -> bool:
    """Whether `text` is an expression a computer algebra system may be asked about.

    Prose, code, towers of powers, long numbers and unfinished operators are refused before
    anything is built from them.
    """
    if len(text) > MAX_SYMBOLIC_LENGTH or "__" in text or any(c in text for c in '"`;@#'):
        return False
    try:
        tokens = tokenize(clean(text))
    except Unreadable:
        return False
    depth = powers = nested = 0
    previous = ""
    stack: list[tuple[int, int]] = []
    for i, t in enumerate(tokens):
        if t.kind == "text" or (t.kind == "word" and len(t.value) > 3 and t.value not in FUNCTIONS):
            return False
        if t.kind in ("command", "word") and t.value in _UNFINISHED:
            return False
        if t.value in ("'", "prime", "circ"):  # math-verify leaves them out
            return False
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        if _is_flattened(tokens, i):
            return False
        if t.value == "%" and after is not None:
            return False
        if t.kind == "number" and after is not None:
            if after.value == "_" or (after.kind == "number" and previous not in _ARGUMENTS):
                return False  # a subscript of a number is left out, "3 1" multiplied
        if t.value in _RELATIONS and (after is None or after.value in _RELATIONS):
            return False
        if t.kind == "number" and (len(t.value) > MAX_SYMBOLIC_DIGITS or "e" in t.value.lower()):
            return False
        if t.value in ("(", "[", "{", "\\{"):
            depth += 1
            stack.append((powers, nested))
            powers += previous == "^"
            nested += previous in FUNCTIONS
            if depth > MAX_SYMBOLIC_DEPTH or powers > 1 or nested > MAX_SYMBOLIC_NESTED:
                return False
        elif t.value in (")", "]", "}", "\\}"):
            depth -= 1
            powers, nested = stack.pop() if stack else (0, 0)
        elif t.value == "^" and (powers or (i > 1 and tokens[i - 2].value == "^")):
            return False
        in_power = powers or previous == "^"
        if t.kind == "number" and (in_power or _follows(tokens, i, "!")):
            if Fraction(t.value.rstrip(".")) > MAX_SYMBOLIC_EXPONENT:
                return False
        previous = t.value
    return any(t.kind != "mark" for t in tokens)


def _is_flattened(tokens: list[Token], i: int) -> bool:
    """What math-verify reads as an ordinary product or power: f(x), x^{(2)}, A^T, ABC, A x B, ||x||."""
    t, behind = tokens[i], [t.value for t in tokens[i + 1 : i + 4]]
    if t.kind == "word":
        if t.value[-1] in "fghFGHP" and behind[:1] == ["("] and behind[2:] in ([")"], ["("]):
            return True
        if re.fullmatch("[A-Z]{2,}|[a-z][CP][a-z]", t.value):
            return True
        return t.value.isupper() and behind[:1] == ["times"]
    if t.value == "^" and behind:
        first = behind[1] if behind[0] == "{" and len(behind) > 1 else behind[0]
        before = tokens[i - 1] if i else t
        is_capital = before.kind == "word" and before.value[-1].isupper()
        return first in ("(", "*") or (is_capital and first in ("T", "H"))
    return t.value == "\\|" or (i == 0 and t.value == "|" and behind[:1] == ["|"])


def same_cases(a: str, b: str) -> bool:
    """False where math-verify would not tell letters apart.

    A letter that stands as a capital and not is the same to it, and a d in one of the two is taken
    for a differential.
    """
    pair = [{t.value for t in tokenize(clean(text)) if len(t.value) == 1} for text in (a, b)]
    letters = pair[0] | pair[1]
    if ("d" in pair[0]) != ("d" in pair[1]):
        return False
    return not any(c.isupper() and c.lower() in letters for c in letters)


def _follows(tokens: list[Token], i: int, mark: str) -> bool:
    return i + 1 < len(tokens) and tokens[i + 1].value == mark
