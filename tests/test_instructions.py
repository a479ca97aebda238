"""IFEval's instructions: each check with responses that pass and that fail, strict and loose."""

import pytest

from r1fast.rewards.instructions import (
    INSTRUCTIONS,
    check_arguments,
    count_sentences,
    follows,
    follows_loosely,
)
from r1fast.rewards.text_language import SCRIPTS, is_language

ENGLISH = "this is a text that you can read and it is in the language of the people who wrote it"
CASES = {  # id: arguments, responses that pass, responses that fail
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2},
        ["THIS and THAT", "A dog said SELF-MADE"],
        ["This and THAT", "this"],
    ),
    "change_case:english_capital": ({}, [ENGLISH.upper()], [ENGLISH, ENGLISH.title(), "123"]),
    "change_case:english_lowercase": (
        {},
        [ENGLISH, "just small letters in this and that"],
        [ENGLISH.upper(), ENGLISH.capitalize(), "das ist ein text und er ist nicht auf englisch, sondern deutsch"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say Hello."},
        ["Say hello.\n\nHello!", "  SAY HELLO. Hi"],
        ["Hello! Say hello.", "Say hell"],
    ),
    "combination:two_responses": (
        {},
        ["one\n******\ntwo", "******one******two"],
        ["one", "one ****** one", "one ****** ****** two", "a ****** b ****** c"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["[name] of [place]", "[a][b][c]"],
        ["[name]", "name place", "[na\nme] [x]"],
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Text.\n\nP.S. more", "text p. s. more"],
        ["Text. PS more", "Text"],
    ),
    "detectable_format:constrained_response": (
        {},
        ["My answer is yes.", "Well. My answer is maybe. So it is."],
        ["My answer is yes", "Yes."],
    ),
    "detectable_format:json_format": (
        {},
        ['{"a": [1, 2]}', '```json\n{"a": 1}\n```', "```\n[1]\n```"],
        ["{'a': 1}", 'Here: {"a": 1}', "```json\n{\n```"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION 1 x SECTION 2 y SECTION 3 z"],
        ["SECTION 1\na", "Section 1 a Section 2 b", "SECTION one SECTION two"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "text\n* a\n- b"],
        ["* a", "* a\n* b\n* c", "**bold** line\n* a"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*one* and *two*", "**one** and **two**"],
        ["*one*", "** and **", "* a\n* b"],
    ),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<< >>", "<<a\nb>>"]),
    "keywords:existence": (
        {"keywords": ["river", "C++"]},
        ["The RIVER runs C++"],
        ["The river", "C++", "CCC river"],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["rock"]},
        ["a rocket", "stone"],
        ["a rock.", "ROCK!"],
    ),
    "keywords:frequency": (
        {"keyword": "war", "relation": "less than", "frequency": 2},
        ["war", "peace"],
        ["war and War", "wars, warm"],
    ),
    "keywords:letter_frequency": (
        {"letter": "#", "let_relation": "at least", "let_frequency": 2},
        ["# a # b"],
        ["# a", "a"],
    ),
    "language:response_language": (
        {"language": "de"},
        ["Das ist ein Text, der nicht auf Englisch ist, sondern auf Deutsch, und er ist kurz."],
        [ENGLISH, "Это текст на русском языке.", "1 2 3"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["One.\n\nWeekend, at last.", 'One.\n\n"weekend" it is'],
        ["Weekend.\n\nOne.", "One.\n\nTwo.\n\nWeekend", "One.\n\nWeekends", "Weekend"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b ***"],
        ["a\n\nb", "a *** b *** c", "a *** *** b"],
    ),
    "length_constraints:number_sentences": (
        {"relation": "at least", "num_sentences": 3},
        ["One. Two! Three?", "Dr. No said so. He left. It cost 3.5 dollars."],
        ["One. Two.", "Dr. No said so. It cost 3.5 dollars."],
    ),
    "length_constraints:number_words": (
        {"relation": "less than", "num_words": 3},
        ["two words", "one"],
        ["these are three", "don't go"],  # three: \w+
    ),
    "punctuation:no_comma": ({}, ["a b c", "a; b"], ["a, b"]),
    "startend:end_checker": (
        {"end_phrase": "Any more questions?"},
        ["Text. Any more questions?", '"Text. any more questions?"  '],
        ["Any more questions? Yes.", "Text."],
    ),
    "startend:quotation": ({}, ['"quoted"', ' "a" and "b" '], ["quoted", '"quoted', '"']),
}  # fmt: skip


def test_all_25_are_here():
    assert sorted(CASES) == sorted(INSTRUCTIONS)
    assert len(INSTRUCTIONS) == 25


@pytest.mark.parametrize("name", sorted(CASES))
def test_check(name):
    arguments, passing, failing = CASES[name]
    check_arguments(name, arguments)
    for response in passing:
        assert follows(response, name, arguments), response
        assert follows(response, f"en:{name}", arguments)
        assert follows_loosely(response, name, arguments), response
    for response in failing:
        assert not follows(response, name, arguments), response
    for response in ("", " \n"):
        assert not follows(response, name, arguments)


def test_the_other_relation():
    words = "length_constraints:number_words"
    assert follows("a b c", words, {"relation": "at least", "num_words": 3})
    assert not follows("a b", words, {"relation": "at least", "num_words": 3})
    sentences = "length_constraints:number_sentences"
    assert follows("One. Two.", sentences, {"relation": "less than", "num_sentences": 3})
    capitals = {"capital_relation": "less than", "capital_frequency": 1}
    assert follows("no capitals", "change_case:capital_word_frequency", capitals)
    assert not follows("ONE", "change_case:capital_word_frequency", capitals)
    assert follows(
        "text P.P.S more", "detectable_content:postscript", {"postscript_marker": "P.P.S"}
    )
    assert not follows("text PPS", "detectable_content:postscript", {"postscript_marker": "P.P.S"})


@pytest.mark.parametrize(
    ("response", "name", "arguments"),
    [
        ('Sure, here it is:\n"quoted"', "startend:quotation", {}),  # the first line off
        ('"quoted"\nI hope you like it.', "startend:quotation", {}),  # the last
        ('Sure:\n"quoted"\nBye.', "startend:quotation", {}),  # both
        ("**My answer is** yes.", "detectable_format:constrained_response", {}),  # asterisks
        ("Here, you see:\nno commas here", "punctuation:no_comma", {}),
    ],
)
def test_loose_forgives(response, name, arguments):
    assert not follows(response, name, arguments)
    assert follows_loosely(response, name, arguments)


def test_loose_does_not_forgive_all():
    assert not follows_loosely("a, b\nc, d\ne, f\ng", "punctuation:no_comma", {})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No end", 1),
        ("One. Two.", 2),
        ('He said "Stop." Then he left.', 2),
        ("Mr. Smith and Dr. Jones met at 5 p.m. on Monday.", 1),
        ("Pi is 3.14. So it is!", 2),
        ("A heading\n\nA text.", 2),
        ("你好。再见！", 2),
        ("Wait... What? Yes!", 3),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


def test_what_a_row_must_bring():
    with pytest.raises(
        ValueError, match="unknown instruction 'keywords:exist'; known: change_case"
    ):
        check_arguments("keywords:exist", {})
    with pytest.raises(ValueError, match=r"'keywords:existence' needs 'keywords', got {}"):
        check_arguments("keywords:existence", {})
    with pytest.raises(ValueError, match="'keywords' must be a list of words, got 'x'"):
        check_arguments("keywords:existence", {"keywords": "x"})
    with pytest.raises(ValueError, match="'relation' must be less than or at least, got 'more'"):
        check_arguments("length_constraints:number_words", {"relation": "more", "num_words": 3})
    with pytest.raises(ValueError, match="'num_words' must be a whole number, got True"):
        check_arguments(
            "length_constraints:number_words", {"relation": "at least", "num_words": True}
        )
    with pytest.raises(ValueError, match="language 'xx' is not known here: ar, bg"):
        check_arguments("language:response_language", {"language": "xx"})


# written for this test
SENTENCES = {
    "ar": "هذا نص قصير عن مدينة كبيرة كانت في الشرق، ولا أحد يعرف ما حدث بعد ذلك.",
    "fa": "این یک متن کوتاه است که در آن از شهری بزرگ یاد می‌شود و آن را دوست دارم.",
    "ur": "یہ ایک چھوٹا سا متن ہے جس میں شہر کے بارے میں لکھا گیا ہے اور وہ بہت بڑا تھا۔",
    "hi": "यह एक छोटा पाठ है और इसमें शहर के बारे में लिखा है, जो बहुत बड़ा था।",
    "mr": "हा एक छोटा मजकूर आहे आणि तो एका शहराविषयी आहे, पण ते खूप मोठे होते.",
    "ne": "यो एक सानो पाठ हो र यसमा एक सहर को बारेमा लेखिएको छ, तर त्यो धेरै ठूलो थियो।",
    "ru": "Это короткий текст о городе, и он был очень большой, но мы его не видели.",
    "bg": "Това е кратък текст за един град и той беше много голям, но ние не го видяхме, защото се качихме.",
    "uk": "Це короткий текст про місто, і воно було дуже велике, але ми його не бачили, бо він є там.",
    "vi": "Đây là một văn bản ngắn về một thành phố và nó rất lớn nhưng tôi không được thấy.",
    "sw": "Hii ni habari fupi ya mji na watu wa mji huo, lakini yeye hakuona kwa sababu ya mvua.",
    "fi": "Tämä on lyhyt teksti kaupungista ja se oli suuri, mutta minä en nähnyt sitä.",
    "it": "Questo è un testo breve su una città che era molto grande, ma non la abbiamo vista.",
    "pt": "Este é um texto curto sobre uma cidade que foi muito grande, mas ele não a viu.",
    "kn": "ಇದು ಒಂದು ಸಣ್ಣ ಪಠ್ಯ.", "pa": "ਇਹ ਇੱਕ ਛੋਟਾ ਪਾਠ ਹੈ।", "gu": "આ એક નાનો પાઠ છે.", "te": "ఇది ఒక చిన్న పాఠం.",
    "ta": "இது ஒரு சிறிய உரை.", "th": "นี่คือข้อความสั้น", "bn": "এটি একটি ছোট লেখা।", "ko": "이것은 짧은 글입니다.",
    "ja": "これは短い文章です。", "zh": "这是一段很短的文字。", "el": "Αυτό είναι ένα κείμενο.", "he": "זה טקסט קצר.",
    "en": ENGLISH,
}  # fmt: skip


@pytest.mark.parametrize("language", sorted(SENTENCES))
def test_languages(language):
    assert is_language(SENTENCES[language], language)
    others = [
        other
        for other in SENTENCES
        if other != language and is_language(SENTENCES[language], other)
    ]
    assert others == []


def test_languages_without_letters():
    assert not is_language("123 !", "en")
    assert set(SENTENCES) <= set(SCRIPTS)
    with pytest.raises(ValueError, match="'tlh' is not known"):
        is_language("x", "tlh")
