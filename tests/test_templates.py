"""Prompts as the model sees them, and completions as they are read and written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.config import TemplateConfig
from r1fast.protocol import (
    PROTOCOLS,
    boxes,
    join_completion,
    opens_think,
    protocol_hint,
    rest_of_completion,
    split_completion,
    whole_completion,
)
from r1fast.templates import (
    R1_ZERO_TEMPLATE,
    encode_prompts,
    encode_text,
    opened_protocols,
    prompt_opens_think,
    render_prompt,
    with_system,
)
from r1fast.types import Problem


class WordTokenizer:
    """Words to ids, a BOS in front as Llama's tokenizers do."""

    chat_template = "yes"
    eos_token_id = 2

    def __init__(self, adds_eos=False):
        self.words = {}
        self.adds_eos = adds_eos

    def encode(self, text, add_special_tokens=True):
        ids = [self.words.setdefault(word, len(self.words) + 3) for word in text.split()]
        return [1, *ids, *([2] if self.adds_eos else [])] if add_special_tokens else ids

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        text = "".join(f"<|{m['role']}|> {m['content']} " for m in messages)
        return "<bos> " + text + "<|assistant|>" * add_generation_prompt


def test_r1_zero_template_is_the_papers():
    assert R1_ZERO_TEMPLATE == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
    )
    assert "\n" not in R1_ZERO_TEMPLATE
    text = render_prompt("What is {x} in {prompt}?", TemplateConfig())
    assert text.endswith("User: What is {x} in {prompt}?. Assistant:")  # no str.format on user text


def test_raw_and_cold_start_wording():
    template = TemplateConfig(name="raw", prompt="Q: {prompt}\nA:")
    assert render_prompt("1 + {1}", template) == "Q: 1 + {1}\nA:"
    with pytest.raises(ValueError, match=r"must hold \{prompt\}"):
        render_prompt("q", TemplateConfig(name="cold_start", prompt="Q:"))


def test_chat_template():
    template = TemplateConfig(name="chat", protocol="think")
    text = render_prompt("hi", template, WordTokenizer())
    assert text == "<bos> <|user|> hi <|assistant|>"
    with_system = TemplateConfig(name="chat", system="Be brief.")
    assert "<|system|> Be brief." in render_prompt("hi", with_system, WordTokenizer())
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        render_prompt("hi", template)
    plain = WordTokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="got WordTokenizer; use 'r1_zero'"):
        render_prompt("hi", template, plain)


def test_special_tokens_are_added_once():
    tokenizer = WordTokenizer()
    problems = [Problem("hi", "1", id="a")]
    raw, _, _ = encode_prompts(problems, tokenizer, TemplateConfig(name="raw"), 10)
    assert raw[0][0] == 1
    chat, _, _ = encode_prompts(problems, tokenizer, TemplateConfig(name="chat"), 10)
    assert 1 not in chat[0]  # the template wrote its own <bos>
    assert encode_text("hi", WordTokenizer(adds_eos=True)) == [1, 3]  # no EOS behind a prompt


def test_long_prompts_are_dropped_and_reported():
    problems = [Problem("a b", "1", id="x"), Problem("a b c d", "1", id="y"), Problem("c", id="z")]
    ids, kept, dropped = encode_prompts(problems, WordTokenizer(), TemplateConfig(name="raw"), 3)
    assert kept == [0, 2]
    assert dropped == [("y", 5)]
    assert [len(i) for i in ids] == [3, 2]
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1"):
        encode_prompts(problems, WordTokenizer(), TemplateConfig(name="raw"), 0)


def test_a_tokenizers_encoding_is_understood():
    class Encoding:
        def __init__(self):
            self.ids = [5, 6]

    class Raw:
        def encode(self, text, add_special_tokens=True):
            return Encoding()

    assert encode_text("x y", Raw()) == [5, 6]


GOOD = "<think> 3 + 5 is 8 </think> <answer> 8 </answer>"


def test_think_answer_parts():
    parts = split_completion(GOOD)
    assert parts.well_formed
    assert (parts.reasoning, parts.answer, parts.summary) == ("3 + 5 is 8", "8", "8")
    assert split_completion("<think></think><answer>8</answer>\n ").well_formed  # empty CoT
    opened = GOOD.removeprefix("<think>")
    assert not split_completion(opened).well_formed
    assert split_completion(opened, prompt_opens_think=True).reasoning == "3 + 5 is 8"
    assert split_completion(opened, prompt_opens_think=True).well_formed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD + " and more", None),  # text behind the answer
        (GOOD + " <answer> 9 </answer>", None),  # a second answer
        ("hm " + GOOD, "8"),
        (GOOD.replace("</think>", "</think> so"), "8"),
        (GOOD.replace("<think>", "<think> <think>"), "8"),
        (GOOD.replace("</think>", "</think> </think>"), "8"),
        (GOOD.replace(" </answer>", ""), None),
        (GOOD.replace("<answer>", ""), None),
        (GOOD.replace("</think>", ""), None),  # all of it is reasoning
        (GOOD.replace("<think>", ""), "8"),
        ("<answer> 8 </answer>", "8"),
        ("<answer> 8 </answer> <think> 3 </think>", None),  # wrong order
        ("<think> <answer> 7 </answer> </think> <answer> 8 </answer>", "8"),
        ("<think> 3 </think> <answer> </answer>", None),
        ("8", None),
        ("", None),
    ],
)
def test_broken_think_answer(text, answer):
    parts = split_completion(text)
    assert not parts.well_formed
    assert parts.fault
    assert parts.answer == answer


@pytest.mark.parametrize("written", PROTOCOLS)
@pytest.mark.parametrize("read", PROTOCOLS)
@pytest.mark.parametrize("opened", [False, True])
def test_texts_of_another_protocol_are_told(written, read, opened):
    texts = [join_completion(f"step {i}", "8", written) for i in range(1000)]
    if opened:  # by the prompt
        texts = [t.removeprefix("<think>").removeprefix("|special_token|") for t in texts]
    hint = protocol_hint(texts, read)
    assert bool(hint) == (written != read)
    assert not hint or hint.endswith(f"--template.protocol={written} reads those")


def test_no_protocol_is_guessed():
    think = ["<think> a </think> b"]
    assert protocol_hint([]) == protocol_hint(["no tags"] * 9) == ""
    assert protocol_hint([GOOD] * 2 + think * 8) == ""  # some follow the own one
    assert protocol_hint(["no tags"] * 6 + think * 4) == ""  # most follow none
    assert '"think"' in protocol_hint(["no tags"] * 4 + think * 6)
    assert protocol_hint(["<#> a <#> b"], "think", "<#>").endswith("=cold_start reads those")
    assert protocol_hint(think * 9, special_token=" ") != ""  # a token that nothing can hold
    assert protocol_hint([*think, GOOD] * 200) == ""  # whatever their order
    unopened = ["r |special_token| s"] * 9
    assert "cold_start" in protocol_hint(unopened, "think")
    assert (
        protocol_hint(unopened, "think", opened=["think"]) == ""
    )  # cold_start would not read them


def test_cut_off_reasoning_is_still_reasoning():
    assert split_completion("<think> 3 + 5 is").reasoning == "3 + 5 is"
    assert split_completion("<think> 3 + 5 is").summary is None
    assert split_completion("|special_token| a b", "cold_start").reasoning == "a b"
    assert split_completion("no tags").reasoning is None


def test_cold_start_parts():
    parts = split_completion("|special_token|a b|special_token|The answer is 8.", "cold_start")
    assert parts.well_formed
    assert (parts.reasoning, parts.summary) == ("a b", "The answer is 8.")
    for text in ("a|special_token|b", "|special_token|a|special_token|",
                 "x|special_token|a|special_token|b",
                 "|special_token|a|special_token|b|special_token|c"):  # fmt: skip
        assert not split_completion(text, "cold_start").well_formed, text
    opened = split_completion("a|special_token|b", "cold_start", prompt_opens_think=True)
    assert opened.well_formed
    assert opened.summary == "b"
    assert split_completion("<#> a <#> b", "cold_start", "<#>").well_formed


def test_think_parts():
    parts = split_completion("<think>\na\n</think>\n\nThe answer is \\boxed{8}.", "think")
    assert parts.well_formed
    assert parts.summary == "The answer is \\boxed{8}."
    assert not split_completion("<think>a</think>", "think").well_formed
    assert not split_completion("<think>a</think> b </think> c", "think").well_formed
    with pytest.raises(ValueError, match="protocol must be one of"):
        split_completion("a", "markdown")


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab 8\n+=|{}", max_size=30),
    st.text(alphabet="ab 8\n+=|{}", min_size=1, max_size=30),
    st.sampled_from(PROTOCOLS),
)
def test_join_is_the_inverse_of_split(reasoning, answer, protocol):
    if not answer.strip():
        with pytest.raises(ValueError, match="is empty"):
            join_completion(reasoning, answer, protocol)
        return
    parts = split_completion(join_completion(reasoning, answer, protocol), protocol)
    assert parts.well_formed
    assert (parts.reasoning, parts.answer) == (reasoning.strip(), answer.strip())


def test_join_refuses_what_cannot_be_read_back():
    with pytest.raises(ValueError, match="'</think>' inside"):
        join_completion("a </think> b", "8")
    with pytest.raises(ValueError, match=r"'\|special_token\|' inside"):
        join_completion("a |special_token| b", "8", "cold_start")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "</answer>", "|special_token|", "8", " "]
        ),
        max_size=12,
    ),
    st.sampled_from(PROTOCOLS),
    st.booleans(),
)
def test_any_order_of_tags_is_read(pieces, protocol, opened):
    """Never an exception; what is called well formed survives being joined and split again."""
    parts = split_completion("".join(pieces), protocol, prompt_opens_think=opened)
    assert parts.well_formed == (not parts.fault)
    if parts.well_formed:
        again = split_completion(
            join_completion(parts.reasoning, parts.summary, protocol), protocol
        )
        assert (again.reasoning, again.summary) == (parts.reasoning, parts.summary)


def test_prompts_that_open_the_thought():
    assert opens_think("<|assistant|><think>\n")
    assert not opens_think(R1_ZERO_TEMPLATE)
    assert opens_think("Q |special_token| ", "cold_start")


def test_boxes():
    assert boxes(r"a \boxed{1} b \boxed {\frac{1}{2}} \fbox{x}") == ["1", r"\frac{1}{2}", "x"]
    assert boxes(r"\boxed{\boxed{7}}") == [r"\boxed{7}"]
    assert boxes(r"\boxed{\{1, 2\}}") == [r"\{1, 2\}"]
    assert boxes(r"\boxed 7$ and \boxed{") == ["7", ""]
    assert boxes(r"\boxedx{7} no") == []


class OpeningTokenizer(WordTokenizer):
    """Its chat template ends in the opening tag, as the released R1's does."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return super().apply_chat_template(messages, tokenize, add_generation_prompt) + "<think>\n"


def test_the_template_says_whether_it_opens_the_thought():
    chat = TemplateConfig(name="chat")
    assert prompt_opens_think(chat, OpeningTokenizer())
    assert not prompt_opens_think(chat, WordTokenizer())
    assert not prompt_opens_think(chat)
    assert not prompt_opens_think(TemplateConfig())
    assert prompt_opens_think(TemplateConfig(name="raw", prompt="Q: {prompt} <think>"))
    special = TemplateConfig(name="raw", protocol="cold_start", prompt="{prompt} |special_token|")
    assert prompt_opens_think(special)
    assert opened_protocols(chat, OpeningTokenizer()) == ["think_answer", "think"]
    assert opened_protocols(chat, WordTokenizer()) == []
    assert opened_protocols(TemplateConfig(special_token="")) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_a_completion_goes_on_where_the_prompt_ends(protocol, space):
    whole = join_completion("a b", "7", protocol)
    tag = "|special_token|" if protocol == "cold_start" else "<think>"
    prompt = f"Q {tag}{space}"
    rest = rest_of_completion(prompt, whole, protocol)
    assert not rest.startswith(tag)
    assert rest_of_completion(prompt, rest, protocol) == rest
    assert rest_of_completion("Q", whole, protocol) == whole
    assert split_completion(rest, protocol, prompt_opens_think=True) == split_completion(
        whole, protocol
    )
    assert split_completion(whole_completion(rest, protocol), protocol).well_formed
    assert whole_completion(whole, protocol) == whole


def test_a_rows_own_system_message():
    chat = TemplateConfig(name="chat", system="Be brief.")
    assert with_system(chat, {}, "row").system == "Be brief."
    assert with_system(chat, {"system": "Be kind."}, "row").system == "Be kind."
    with pytest.raises(ValueError, match=r"row has a system message.*'r1_zero' has no place"):
        with_system(TemplateConfig(), {"system": "Be kind."}, "row")
    problem = Problem("Hello", kind="general", meta={"system": "Be kind."})
    tokenizer = WordTokenizer()
    (ids,), _, _ = encode_prompts([problem], tokenizer, chat, 50)
    words = {i: word for word, i in tokenizer.words.items()}
    assert " ".join(words[i] for i in ids).startswith("<bos> <|system|> Be kind. <|user|> Hello")
