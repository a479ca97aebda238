"""`r1fast evaluate` from the command line: presets, a judge over HTTP, rescoring, comparing, the page."""

import json
import re

import pytest
from test_judge import by_length, endpoint, teach  # noqa: F401
from tiny import tiny_checkpoint

from r1fast.__main__ import main, parse
from r1fast.evaluate_command import evaluation_config
from r1fast.evaluation_table import show_evaluation
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.report.browser import MAX_CHARS, MAX_SAMPLES, choose
from r1fast.report.evaluation import curve
from r1fast.rewards.chat import defused

TINY = [
    "--rollout.max_completion_tokens=8",
    "--model.device=cpu",
    "--rollout.max_prompt_tokens=700",
]
GSM8K = [{"question": f"What is {i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(4)]
MMLU = [
    {"question": f"{i}?", "subject": f"s{i % 2}", "choices": ["1", "2"], "answer": i % 2}
    for i in range(4)
]
IFEVAL = [{"key": i, "prompt": f"Say {i}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
          for i in range(3)]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "model", max_position_embeddings=1024)
    for name, rows in (("gsm8k", GSM8K), ("mmlu", MMLU), ("ifeval", IFEVAL)):
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def go(files, *words, out) -> int:
    return main(["evaluate", *map(str, words), *TINY, f"--output_dir={out}"])


def read(folder, name="eval.json") -> dict:
    return json.loads((folder / name).read_text())


def test_a_preset_of_a_model_by_itself(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = [files / "model", "--preset", "gsm8k", "--data", files / "gsm8k.jsonl"]
    assert go(files, *words, out=tmp_path) == 0
    shown = capsys.readouterr()
    assert "4 problems, 4 samples each" in shown.out
    assert (
        max(map(len, shown.out.splitlines())) <= 100
    )  # the path of the report is as long as it is
    assert "template: chat; answers are read by protocol think" in " ".join(shown.err.split())
    result, setup = read(tmp_path), read(tmp_path, "evaluation.json")
    assert (result["temperature"], result["top_p"], result["k"]) == (0.6, 0.95, 4)
    assert {"pass@1", "pass@2", "pass@4", "cons@k", "pass@1_run_stderr"} <= result.keys()
    assert (setup["preset"], setup["template"]["name"]) == ("gsm8k", "chat")
    assert setup["grader"].startswith("math-")
    assert read(tmp_path, "manifest.json")["preset"] == "gsm8k"
    page = (tmp_path / "report.html").read_text()
    assert "How pass@k grows with k" in page
    # what the command line says goes before the preset
    assert go(files, *words, "--eval.num_samples=2", "--eval.temperature=0", out=tmp_path) == 0
    assert (read(tmp_path)["k"], read(tmp_path)["temperature"]) == (2, 0)


def test_rescore_and_compare(files, tmp_path, capsys):
    words = ["--data", files / "gsm8k.jsonl", "--preset=gsm8k"]
    for seed in (0, 1):
        assert go(files, files / "model", *words, f"--seed={seed}", out=tmp_path / str(seed)) == 0
    # what was sampled is given another text: the right answer
    path = tmp_path / "1" / "samples.jsonl"
    rows = [
        row | {"text": f"The answer is \\boxed{{{row['answer']}}}."} for _, row in read_jsonl(path)
    ]
    write_jsonl(path, rows)
    capsys.readouterr()
    assert main(["evaluate", "--rescore", str(tmp_path / "1")]) == 0
    shown = capsys.readouterr().out
    assert "16 samples graded again, 16 changed" in shown
    assert read(tmp_path / "1")["pass@1"] == 1
    page = (tmp_path / "1" / "report.html").read_text()
    assert f"graded by {read(tmp_path / '1', 'evaluation.json')['grader']}" in page
    assert "graded again (16 of 16 samples changed; before: math-" in page
    assert "graded again" not in (tmp_path / "0" / "report.html").read_text()
    assert main(["evaluate", "--compare", str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    shown = capsys.readouterr().out
    assert "pass@1 paired by problem: bootstrap interval, p by sign flips" in shown
    assert "fewer than 20 problems in this: the interval is too narrow" in " ".join(shown.split())
    assert max(map(len, shown.split("a = ")[0].splitlines())) <= 80
    assert main(["evaluate", "--compare", str(tmp_path / "0"), str(tmp_path / "1"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["all"]["difference"] == pytest.approx(1 - read(tmp_path / "0")["pass@1"])
    # all four may have changed, and then p is as small as four problems can make it
    assert told["all"]["p_value"] == 2.0 ** (1 - told["all"]["num_better"])
    assert told["all"]["note"] == "4 problems: the interval is too narrow"
    wrong = [row | {"verdict": "wrong"} for row in rows[:4]]
    right = [row | {"verdict": "correct"} for row in rows[:4]]
    for name, of in (("one", wrong), ("two", right)):
        write_jsonl(tmp_path / name / "samples.jsonl", of)
    assert main(["evaluate", "--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("all problems"))
    assert line.split()[2:] == ["1", "0.000", "1.000", "+1.000", "-", "1.000"]


@pytest.mark.parametrize(("preset", "key"), [("mmlu", "pass@1"), ("ifeval", "instruction_strict")])
def test_other_presets(files, tmp_path, capsys, preset, key):
    assert (
        go(
            files,
            files / "model",
            "--preset",
            preset,
            "--data",
            files / f"{preset}.jsonl",
            out=tmp_path,
        )
        == 0
    )
    assert key in read(tmp_path)
    shown = capsys.readouterr().out
    assert ("By subset" if preset == "mmlu" else "By instruction") in shown
    assert main(["evaluate", "--rescore", str(tmp_path)]) == 0
    assert "0 changed" in capsys.readouterr().out
    if preset == "ifeval":  # a random model writes no comma most of the time
        assert read(tmp_path)["instructions"]["punctuation:no_comma"]["num"] == 12


def test_prompts_that_do_not_fit(files, tmp_path, capsys):
    words = [files / "model", "--preset=gsm8k", "--data", files / "gsm8k.jsonl"]
    assert (
        main(
            [
                "evaluate",
                *map(str, words),
                "--rollout.max_prompt_tokens=5",
                f"--output_dir={tmp_path}",
            ]
        )
        == 2
    )
    assert "none of the 4 prompts fits into rollout.max_prompt_tokens = 5" in " ".join(
        capsys.readouterr().err.split()
    )


def answers_right(system: str, user: str) -> str:
    return '{"verdict": "correct"}'


def test_a_judged_preset_asks_the_endpoint(files, tmp_path, endpoint, capsys):  # noqa: F811
    endpoint.judge = answers_right
    (tmp_path / "s.csv").write_text("metadata,problem,answer\nx,Who?,Ada\n")
    words = [files / "model", "--preset=simpleqa", f"--data={tmp_path / 's.csv'}",
             f"--judge-url={endpoint.url}", "--judge-model=kind"]  # fmt: skip
    assert go(files, *words, out=tmp_path / "run") == 0
    result = read(tmp_path / "run")
    assert result["verdicts"].get("correct", 0) + result["verdicts"].get("no_answer", 0) == 4
    assert result["f_score"] == 1 or result["verdicts"].get("no_answer")
    users = [body["messages"][1]["content"] for *_, body in endpoint.requests]
    assert all("Question:\nWho?\n" in text for text in users)
    assert result["judge"]["model"] == "kind"
    assert result["judge"]["requests"] == len(users)
    assert f"judge kind: {len(users)} requests" in " ".join(capsys.readouterr().out.split())
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert rows[0]["grader"].endswith(" kind")
    assert read(tmp_path / "run", "manifest.json")["judge"] == "kind"
    assert go(files, *words, out=tmp_path / "run") == 0  # nobody is asked again
    assert read(tmp_path / "run") == result
    assert len(endpoint.requests) == len(users)
    # the config's judge is as good, and what the command line names goes before it
    other = [*words[:3], f"--judge.url={endpoint.url}", "--judge.model=strict"]
    assert go(files, *other, out=tmp_path / "strict") == 0
    assert endpoint.requests[-1][2]["model"] == "strict"
    over = [*words, "--judge.url=http://127.0.0.1:9", "--judge.model=other"]
    assert go(files, *over, out=tmp_path / "over") == 0
    assert endpoint.requests[-1][2]["model"] == "kind"


OPEN = [
    {"instruction": f"Say {word}", "output": " ".join([word] * n), "dataset": f"d{n % 2}"}
    for n, word in ((1, "hi"), (40, "bye"), (3, "so"))
]


def open_words(files, tmp_path, url: str) -> list:
    (tmp_path / "alpaca.json").write_text(json.dumps(OPEN))
    judge = [f"--judge-url={url}", "--judge-model=m", "--judge.num_retries=0"] * bool(url)
    return [files / "model", "--preset=alpaca_eval", f"--data={tmp_path / 'alpaca.json'}", *judge,
            "--eval.num_samples=3", "--eval.temperature=1"]  # fmt: skip


def test_pairs_by_a_judge_that_goes_by_content(files, tmp_path, endpoint, capsys):  # noqa: F811
    endpoint.judge = by_length
    words = open_words(files, tmp_path, endpoint.url)
    assert go(files, *words, out=tmp_path / "run") == 0
    result = read(tmp_path / "run")
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert (result["num_problems"], result["num_samples"], len(rows)) == (3, 9, 9)
    for row in rows:  # this judge prefers the longer
        answer = "" if row["extracted"] is None else row["extracted"]
        baseline = next(x["output"] for x in OPEN if x["instruction"] == row["prompt"])
        longer = len(defused(answer).strip("\n")) - len(baseline)
        score = 0.0 if not answer else 1.0 if longer > 0 else 0.0 if longer < 0 else 0.5
        assert row["score"] == score, row
    assert result["win_rate"] == pytest.approx(sum(row["score"] for row in rows) / 9)
    assert 0 < result["win_rate"] < 1
    assert result["position_bias"] == result["inconsistent"] == 0.0
    assert result["judge"]["requests"] == len(endpoint.requests) > 0
    assert result["judge"]["failed"] == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("win rate", "judge: position bias", "judge: inconsistent", "judge m: "):
        assert text in shown
    # responses are a function of the seed: the judge is asked the same again
    assert go(files, *words, out=tmp_path / "again") == 0
    assert read(tmp_path / "again") == result
    # one more sample a problem: the cost is that of all judgements
    asked = len(endpoint.requests)
    more = [*words[:-2], "--eval.num_samples=4", words[-1]]
    assert go(files, *more, out=tmp_path / "again") == 0
    new = len(endpoint.requests) - asked
    assert read(tmp_path / "again")["judge"]["requests"] == result["judge"]["requests"] + new
    assert 0 < new < result["judge"]["requests"]
    # samples are graded again by another judge, without a model
    endpoint.judge = lambda system, user: '{"verdict": "A=B"}'
    rescored = ["evaluate", "--rescore", str(tmp_path / "run")]
    assert main(rescored) == 2
    assert "was judged, and is to be again: name an OpenAI" in capsys.readouterr().err
    assert main([*rescored, f"--judge-url={endpoint.url}", "--judge-model=tied"]) == 0
    now = read(tmp_path / "run")
    assert now["outcomes"]["tie"] == sum(bool(row["extracted"]) for row in rows)
    assert now["judge"]["model"] == "tied"


def test_a_judge_of_places_alone_shows(files, tmp_path, endpoint):  # noqa: F811
    endpoint.judge = lambda system, user: '{"verdict": "A>>B"}'
    assert go(files, *open_words(files, tmp_path, endpoint.url), out=tmp_path) == 0
    result = read(tmp_path)
    assert result["position_bias"] == result["inconsistent"] == 1.0
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    judged = [row for row in rows if row["grades"]]
    assert judged
    assert {(row["outcome"], *row["grades"]) for row in judged} == {("tie", 2, -2)}
    assert "Judge: position bias" in (tmp_path / "report.html").read_text()


def test_a_judge_that_fails_is_no_score(files, tmp_path, endpoint, capsys):  # noqa: F811
    """One failed judgement leaves its comparison out; more than half, and there is no number."""
    endpoint.judge = by_length
    endpoint.replies = [(500, "down")]
    words = [*open_words(files, tmp_path, endpoint.url), "--judge.num_threads=1"]
    assert go(files, *words, out=tmp_path / "once") == 0
    result = read(tmp_path / "once")
    assert (result["num_errors"], result["outcomes"]["error"], result["judge"]["failed"]) == (
        1, 1, 1,
    )  # fmt: skip
    rows = [row for _, row in read_jsonl(tmp_path / "once" / "samples.jsonl")]
    assert [row["score"] for row in rows if row["verdict"] == "error"] == [None]
    down = open_words(files, tmp_path, "http://127.0.0.1:9")
    capsys.readouterr()
    assert go(files, *down, out=tmp_path / "down") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search("failed on . of .*last failure: .*reached", error), error
    assert not (tmp_path / "down" / "eval.json").exists()
    few = [*down, "--eval.num_problems=1"]
    assert go(files, *few, out=tmp_path / "down") == 1
    assert "the judge failed on 3 of 3 answers" in " ".join(capsys.readouterr().err.split())
    assert go(files, *words, out=tmp_path / "down") == 0  # a judge that is there goes on
    assert "samples were drawn before and are used again" in " ".join(
        capsys.readouterr().err.split()
    )
    assert read(tmp_path / "down")["num_samples"] == 9


def test_a_judge_in_process(files, tmp_path, capsys):
    """A model that has learnt to prefer what it sees first, sampled by the embedded engine."""
    teach('{"verdict": "A>>B"}').save(tmp_path / "judge")
    words = [*open_words(files, tmp_path, ""), "--judge.num_retries=0"]
    biased = [*words, f"--judge.path={tmp_path / 'judge'}", "--judge.max_reply_tokens=32"]
    assert go(files, *biased, out=tmp_path / "run") == 0
    result = read(tmp_path / "run")
    assert result["position_bias"] == result["inconsistent"] == 1.0
    assert result["judge"]["model"] == str(tmp_path / "judge")
    assert result["judge"]["completion_tokens"] > 0
    # a random one says nothing that can be read: an error, never a score
    capsys.readouterr()
    random = [*words, f"--judge.path={files / 'model'}", "--judge.max_reply_tokens=4"]
    assert go(files, *random, out=tmp_path / "random") == 1
    assert "failed on" in (error := " ".join(capsys.readouterr().err.split()))
    assert re.search("the judge's (reply cannot be read|context has)", error), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "data.eval is empty: name a file of problems"),
        (["MODEL", "--preset=gsm"], "unknown preset 'gsm'; known: gsm8k"),
        (["MODEL", "--preset=gsm8k"], "--preset gsm8k needs --data FILE: test.jsonl"),
        (["MODEL", "--preset=simpleqa", "--data=x"], "preset simpleqa is judged"),
        (["MODEL", "--preset=gsm8k", "--data=none.jsonl"], "'none.jsonl' does not exist"),
        (
            ["MODEL", "--preset=simpleqa", "--data=x", "--judge-url=http://x"],
            "needs both --judge-url and",
        ),
        (["MODEL", "--eval.num_sample=3"], "did you mean 'num_samples'"),
        (["--compare", "a"], "--compare takes two run folders, got 1"),
        (["--compare", "nowhere", "nothing"], "'nowhere' has no samples.jsonl"),
        (["--rescore", "nowhere"], "'nowhere' has no samples.jsonl"),
        (["--rescore", "a", "b"], "takes a config file or a model, got 2"),
        (["--rescore=a", "--preset=gsm8k"], "two different things to do"),
    ],
)
def test_wrong_words(files, tmp_path, capsys, words, message):
    words = [str(files / "model") if word == "MODEL" else word for word in words]
    assert main(["evaluate", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_where_a_model_by_itself_is_evaluated():
    config = evaluation_config("some/Model-1B", [], {"preset": "aime", "data": "a.jsonl"})
    assert config.output_dir == "runs/evaluate/Model-1B-aime"
    assert config.model.path == "some/Model-1B"
    assert (config.eval.num_samples, config.rollout.max_completion_tokens) == (64, 32768)
    for path, name in {
        "D/demo/r1_zero/model": "demo-r1_zero", "D/other/r1_zero/model/": "other-r1_zero",
        "runs/gsm8k/model": "gsm8k", "Qwen/Qwen3-0.6B": "Qwen3-0.6B",
    }.items():  # fmt: skip
        config = evaluation_config(path, [], {"data": "b.jsonl"})
        assert config.output_dir == f"runs/evaluate/{name}-b"
    config = evaluation_config("m", ["--output_dir=x", "--eval.num_samples=3"], {"data": "b.jsonl"})
    assert (config.output_dir, config.data.eval, config.eval.num_samples) == ("x", "b.jsonl", 3)
    assert parse(["evaluate", "--compare", "a", "b"]) == ("evaluate", "b", [], {"compare": "a"})


def kept(folder) -> dict:
    names = ("samples.jsonl", "evaluation.json", "problems.jsonl", "eval.json", "manifest.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_another_evaluation_in_a_folder_is_set_aside(files, tmp_path, capsys, monkeypatch):
    """Other weights, fewer problems, other rewards; not the same again, nor more samples of it."""
    tiny_checkpoint(tmp_path / "other", seed=1, max_position_embeddings=1024)
    words = ["--data", files / "gsm8k.jsonl", "--preset=gsm8k"]
    out = tmp_path / "out"

    def replaced() -> list:
        return sorted((out / "replaced").glob("*"), key=lambda path: path.stat().st_ctime_ns)

    def run(*more) -> str:
        capsys.readouterr()
        assert go(files, *more, *words, out=out) == 0
        return " ".join(capsys.readouterr().err.split())

    run(files / "model", "--eval.num_samples=2")
    assert "8 of 16 samples were drawn before" in run(files / "model")
    assert "16 of 16 samples were drawn before" in run(files / "model")
    assert replaced() == []
    assert main(["evaluate", "--rescore", str(out)]) == 0
    first = kept(out)

    # the other model's is killed, and goes on: the first one's is set aside once, and whole
    with monkeypatch.context() as patch:
        patch.setattr("r1fast.evaluate.run.store", lambda *args: 1 / 0)
        capsys.readouterr()
        with pytest.raises(ZeroDivisionError):
            go(files, tmp_path / "other", *words, out=out)
    said = " ".join(capsys.readouterr().err.split())
    assert f"held another evaluation: it was set aside, in {replaced()[0]}" in said
    assert not (out / "samples.jsonl").exists()
    assert "16 of 16 samples were drawn before" in run(tmp_path / "other")
    assert [kept(path) for path in replaced()] == [first]
    assert (replaced()[0] / "rescored.json").is_file()
    assert not (out / "rescored.json").exists()
    assert (
        read(out, "evaluation.json")["weights"] != read(replaced()[0], "evaluation.json")["weights"]
    )
    assert main(["evaluate", "--compare", str(replaced()[0]), str(out)]) == 0

    # what still holds is used again, beside the copy
    second = kept(out)
    assert "4 of 4 samples were drawn before" in run(tmp_path / "other", "--eval.num_problems=1")
    assert kept(replaced()[1]) == second
    third = kept(out)
    changed = ["--eval.num_problems=1", "--rewards.format=0.25"]
    assert "4 of 4 samples were drawn before" in run(tmp_path / "other", *changed)
    assert kept(replaced()[2]) == third
    # and as before: what is kept already is not kept twice
    run(files / "model")
    run(tmp_path / "other")
    assert len(replaced()) == 4


def row(i: int, verdict: str = "correct", sample: int = 0, **changes) -> dict:
    return {"problem_id": f"p{i}", "kind": "math", "subset": "", "prompt": f"question {i}", "answer": "1",
            "sample": sample, "text": "text", "finish_reason": "stop", "num_tokens": 3, "extracted": "1",
            "verdict": verdict} | changes  # fmt: skip


def test_the_page_stays_small(tmp_path):
    rows = [row(i, "wrong" if i % 50 == 0 else "correct", j) for i in range(1000) for j in range(2)]
    kept = choose(rows)
    assert len(kept) == MAX_SAMPLES
    assert sum(r["verdict"] == "wrong" for r in kept) == 40  # all of the rare ones
    assert len({r["problem_id"] for r in kept}) == 380  # second samples of the rare ones alone
    long = [row(i, text="x" * 10**5, prompt="y" * 10**5) for i in range(1000)]
    assert 0 < sum(9500 for _ in choose(long)) <= MAX_CHARS
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "evaluate", "title": "e"}))
    (tmp_path / "eval.json").write_text(json.dumps({"num_problems": 1000, "k": 1, "pass@1": 0.5}))
    write_jsonl(tmp_path / "samples.jsonl", long)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2 * MAX_CHARS
    assert re.search(r"\d+ of 1,000 samples, so that the page stays small", page)
    assert "[94,000 characters left out]" in page


def test_the_page_shows_each_kind_and_escapes_what_was_written(tmp_path, capsys):
    evil = "</details><script>alert(1)</script>"
    rows = [
        row(0, evil, subset=evil, text=evil, prompt=evil, extracted=evil, answer=evil),
        row(1, "wrong", kind="if", instructions=["a:b", evil], followed=[True, False],
            followed_loosely=[True, True], extracted="missed"),
        row(2, "wrong", kind="open", outcome="tie", score=0.5, answer=None),
        row(3, "timeout", finish_reason="length", why=evil),
    ]  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "evaluate", "title": "e"}))
    result = {"num_problems": 4, "k": 1, "win_rate": 0.5, "win_rate_stderr": None, "outcomes": {"tie": 1},
              "subsets": {evil: {"num_problems": 1, "win_rate": 0.5}},
              "kinds": {"if": {"num_problems": 1, "pass@1": 0.25}, "open": {"num_problems": 1, "win_rate": 0.5}},
              "instructions": {evil: {"num": 1, "strict": 0.0, "loose": 1.0}}}  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(result))
    write_jsonl(tmp_path / "samples.jsonl", rows)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == 1
    assert page.count("<details") == page.count("</details>")
    assert "win rate is 0.500" in page
    assert "(loosely followed)" in page
    assert 'data-verdict="tie"' in page
    assert 'data-cut="1"' in page
    assert "The win rate counts a tie as half" in page
    assert "By kind of problem" in page
    assert re.search("pass@1 or win rate.*0.250.*0.500", page)
    show_evaluation(result)
    shown = capsys.readouterr().out
    assert re.search(r"By kind\n\s*kind\s+problems\s+pass@1 or win rate", shown)
    assert re.search(r"if\s+1\s+0.250", shown)
    assert "one of k samples is right" not in page  # there is no pass@k


def test_rows_of_the_page_begin_where_their_questions_differ(tmp_path):
    """A preset's wording is the same for all: the row shows the id and the question."""
    wording = "Complete the function.\n\n```python\n"
    rows = [row(i, kind="code", prompt=f"{wording}def f{i}():") for i in (10, 11)]
    rows.append(row(2, prompt="How many?"))
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "evaluate", "title": "e"}))
    (tmp_path / "eval.json").write_text(json.dumps({"num_problems": 3, "k": 1, "pass@1": 1.0}))
    write_jsonl(tmp_path / "samples.jsonl", rows)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    titles = re.findall(r'<span class="q"><span class="dim">(.*?)</span> (.*?)</span>', page)
    assert titles == [("p10", "def f10():"), ("p11", "def f11():"), ("p2", "How many?")]
    assert page.count(f"<pre>{wording}") == 2  # in full below


def test_the_curve_of_a_stage():
    found = curve(
        {"pass@1": 0.5, "pass@16": 0.9, "pass@2": 0.6, "pass@2_stderr": 0.1, "pass@1_run_stderr": 1}
    )
    assert found == [(1, 0.5, None), (2, 0.6, 0.1), (16, 0.9, None)]
