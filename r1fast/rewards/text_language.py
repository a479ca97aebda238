"""Which language a whole text is in: by its script, and by function words among those that share one.

`lingua` (the extra `lang`) decides among languages of one script where it is installed and knows all
of them; the words here decide otherwise, and are right for a text of a few sentences.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec

# language -> script, as unicodedata names it
SCRIPTS = {
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "bg": "CYRILLIC", "mk": "CYRILLIC",
    "ru": "CYRILLIC", "uk": "CYRILLIC", "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne": "DEVANAGARI",
    "bn": "BENGALI", "gu": "GUJARATI", "pa": "GURMUKHI", "kn": "KANNADA", "ml": "MALAYALAM",
    "ta": "TAMIL", "te": "TELUGU", "th": "THAI", "el": "GREEK", "he": "HEBREW", "ko": "HANGUL",
    "ja": "HIRAGANA", "zh": "CJK",
    **dict.fromkeys(
        ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "fi", "pl", "cs", "ro", "hu", "tr",
         "id", "sw", "vi"), "LATIN"),
}  # fmt: skip
# frequent words that the other languages of the script do not have, or seldom
_WORDS = {
    "en": "the of and to in is that it for you with on as are be this not have or at by from an we they can your will if was he she my what there which their would about",
    "de": "der die das und ist nicht ein eine zu den mit sich auf für von dem im auch es ich sie wir wie werden wird oder aber bei nach hat sind einen einer durch kann",
    "fr": "le la les et est une des du que qui dans pour pas sur avec au ce il elle nous vous sont cette mais ou par plus être ont aux ses leur fait très",
    "es": "el la los las y es una que en por con para no del se lo como más pero su al está son este esta muy también hay fue ser sus cuando todo",
    "it": "il di che è la per un una non con sono del della le si gli nel più come ma anche questo alla dei delle ha essere nella molto dal ed sua",
    "pt": "o a os as e é um uma que em não do da para com por mais se como mas foi ao dos das são no na você também ele ela muito está seu sua isso",
    "nl": "de het een en van is dat niet op te zijn met voor aan er maar om ook als dan naar bij wordt deze uit worden kan heeft nog geen hun",
    "sv": "och att det som en på är av för med den till inte om ett har de från så kan vi man var jag men också eller när mycket vid",
    "da": "og at det er en til på som af for med den ikke de et har jeg kan var fra vi men så om også eller når meget ved blev",
    "fi": "ja on ei se että oli mutta myös kun tai ovat hän joka jos niin kuin sen ole voi tämä ne mitä minä sinä olla hyvin sekä vain kanssa",
    "pl": "i w na z nie się do jest to że jak ale po co tak za od jego dla są przez był może już tylko oraz które przy jej czy tym",
    "cs": "a je v na se to že s z do o ve jsou který jako by ale si po byl nebo pro jeho také být tak jsem které při jen",
    "ro": "și de în la a cu pe nu este o din că pentru un mai care se sunt ce să au fost sau dar prin fi această poate foarte",
    "hu": "a az és hogy nem is egy ez van meg csak de volt már ki mint vagy azt el még ha lehet kell nagyon minden amely akkor",
    "tr": "ve bir bu da de için ile çok ne olarak daha var gibi ama olan en kadar değil sonra ben o mi her ya olduğu şey",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena tersebut bisa ada mereka lebih kita adalah oleh atau sudah",
    "sw": "na ya wa kwa ni katika la za kuwa cha hii hiyo pia kama lakini yake watu sana au vya yao alikuwa hilo wote mtu hata ambayo ili kila",
    "vi": "và của là có cho không được một trong các với người này đã để những khi từ đến cũng như về tôi bạn rất ra nhiều hay nhưng nếu phải",
    "ar": "في من على إلى أن هذا هذه التي الذي مع عن كان هو هي ما لا كل بعد قد أو ثم بين كما ذلك لم كانت عند",
    "fa": "و در به از که این را با است برای آن یک خود تا بر هم نیز شود می‌شود ها هر شما من ما آنها کرد شده باید می",
    "ur": "کے کی میں ہے اور سے کا کو نے پر ہیں یہ کہ تھا ایک نہیں لیے بھی کر وہ ہو گیا تو جو اس آپ تھی ہم",
    "ru": "и в не на что с как это по но из у за то для все он она они так от был быть или если мы вы его только также",
    "uk": "і в не на що з як це та до але від за для він вона вони так бути або якщо ми ви його її також був є у про",
    "bg": "и на да се в от за не е с са по че като но това ще към или при до тя той те беше съм много което който си",
    "mk": "и на да се во од за не е со што по но како ќе тој таа тие беше или при до сум многу кој која ова оваа ги го",
    "hi": "है हैं के का की में से और को पर यह नहीं था एक ने कि भी लिए हो कर वह तो या थे आप हम ही जो थी रहा",
    "mr": "आहे आणि च्या मध्ये या तो ते हे ही की नाही आहेत होते होता एक असे तर पण हा तुम्ही मी त्या करून साठी काही आपण खूप",
    "ne": "छ र को मा ले लाई हो छन् यो पनि गर्न भएको हुन्छ गर्ने एक थियो तर त्यो म तपाईं हामी गरेको गर्दा भन्ने सबै हुन धेरै का",
}  # fmt: skip
_MIN_WORDS = 4  # of a script's function words, or a short text is taken by its script alone


_LONG_WORD = re.compile(r"(\w{64})\w+")


def check_known(language: str) -> None:
    """ValueError with the known languages where `language` is none of them."""
    if language not in SCRIPTS:
        raise ValueError(f"language {language!r} is not known here: {', '.join(sorted(SCRIPTS))}")


def is_language(text: str, language: str) -> bool:
    """Whether `text` as a whole is in `language`; False where it holds no letters."""
    check_known(language)
    script, letters = _main_script(text)
    if not letters or script != SCRIPTS[language]:
        return False
    rivals = tuple(name for name, s in SCRIPTS.items() if s == script)
    if len(rivals) == 1:
        return True
    words = re.findall(
        r"[^\W\d_]+(?:[\u0900-\u097f\u200c\w])*", unicodedata.normalize("NFC", text).lower()
    )
    votes = Counter({name: sum(word in _word_set(name) for word in words) for name in rivals})
    if _lingua_knows(language):
        # lingua takes a language that it does not know (Nepali) for a neighbour (Hindi)
        unknown = [votes[name] for name in rivals if not _lingua_knows(name)]
        short = _LONG_WORD.sub(
            r"\1", text
        )  # lingua's time grows with the square of a word's length
        return _detect(short) == language and max(unknown, default=0) <= votes[language]
    best = max(votes.values())
    if best < _MIN_WORDS and len(words) < 3 * _MIN_WORDS:
        return votes[language] == best or not best
    return votes[language] == best > 0


def _main_script(text: str) -> tuple[str, int]:
    """The script of most letters, and how many they are; kana makes Han Japanese."""
    counts: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            counts[_script(character)] += 1
    if counts["HIRAGANA"] * 10 > counts["CJK"]:
        counts["HIRAGANA"] += counts.pop("CJK", 0)
    return counts.most_common(1)[0] if counts else ("", 0)


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return {"KATAKANA": "HIRAGANA", "FULLWIDTH": "LATIN"}.get(name, name)


@lru_cache(maxsize=64)
def _word_set(language: str) -> frozenset[str]:
    return frozenset(_WORDS[language].split())


@lru_cache(maxsize=64)
def _lingua_knows(language: str) -> bool:
    if find_spec("lingua") is None:
        return False
    from lingua import IsoCode639_1

    return hasattr(IsoCode639_1, language.upper())


@lru_cache(maxsize=1)
def _detector():
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


@lru_cache(maxsize=1 << 12)
def _detect(text: str) -> str:
    found = _detector().detect_language_of(text)
    return found.iso_code_639_1.name.lower() if found is not None else ""
