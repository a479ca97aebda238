"""Stored samples to read on the page, filtered by verdict, subset and words.

The page stays small: at most MAX_SAMPLES of them, verdicts in turns, long texts cut in the middle;
how many are left out is said above them. Without JavaScript all of these can be read, unfiltered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from r1fast.report.run import Run, number, shown

MAX_SAMPLES = 400
MAX_PROMPT, MAX_RESPONSE = 3000, 6000  # characters of a sample that are shown
MAX_CHARS = 2_500_000  # of all samples

STYLE = """
.filters{display:flex;flex-wrap:wrap;gap:8px 10px;align-items:center;margin:14px 0 10px;font-size:13.5px}
.filters button,.filters select,.filters input{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:99px;padding:4px 12px}
.filters button{cursor:pointer}
.filters button[aria-pressed=true]{background:var(--fg);color:var(--bg);border-color:var(--fg)}
.filters input[type=search]{border-radius:8px;min-width:min(220px,100%);flex:1}
.filters label{display:flex;gap:6px;align-items:center}
.samples{margin:0 0 14px}
.sample{margin:0;border-radius:0;border-bottom-width:0}
.sample:first-of-type{border-radius:8px 8px 0 0}
.sample:last-of-type{border-radius:0 0 8px 8px;border-bottom-width:1px}
.sample summary{display:grid;grid-template-columns:8.5em minmax(0,1fr) auto;gap:4px 14px;align-items:baseline;
font-weight:400;list-style:none}
.sample summary::-webkit-details-marker{display:none}
.sample summary .q{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.sample summary .facts{color:var(--muted);font-size:12.5px;white-space:nowrap}
.sample h4{font-size:12.5px;font-weight:500;color:var(--muted);margin:0;padding:10px 14px 0;
border-top:1px solid var(--line)}
.sample pre{border-top:0;padding:6px 14px 12px}
.sample .checks{margin:6px 14px 12px;padding:0;list-style:none;font-size:13.5px}
@media(max-width:640px){.sample summary{grid-template-columns:8.5em minmax(0,1fr)}
.sample summary .facts{grid-column:1/-1;white-space:normal;overflow-wrap:anywhere}}
"""
SCRIPT = """
(function(){
var box=document.getElementById('samples'),bar=document.getElementById('filters');
if(!box||!bar)return;
bar.hidden=false;
var all=[].slice.call(box.querySelectorAll('.sample')),buttons=[].slice.call(bar.querySelectorAll('button')),
subset=bar.querySelector('select'),words=bar.querySelector('input[type=search]'),
cut=bar.querySelector('input[type=checkbox]'),count=document.getElementById('count'),verdict='';
var texts=null;
function apply(){
var w=words.value.trim().toLowerCase(),n=0;
if(w&&!texts)texts=all.map(function(s){return s.textContent.toLowerCase()});
all.forEach(function(s,i){
var ok=(!verdict||s.dataset.verdict===verdict)&&(!subset||!subset.value||s.dataset.subset===subset.value)&&
(!cut.checked||s.dataset.cut==='1')&&(!w||texts[i].indexOf(w)>=0);
s.hidden=!ok;n+=ok;});
count.textContent=n===all.length?all.length+' samples':n+' of '+all.length+' samples';}
buttons.forEach(function(b){b.addEventListener('click',function(){verdict=b.dataset.verdict;
buttons.forEach(function(o){o.setAttribute('aria-pressed',String(o===b))});apply();});});
if(subset)subset.addEventListener('change',apply);
words.addEventListener('input',apply);cut.addEventListener('change',apply);apply();
})();
"""


def browser(run: Run) -> list[str]:
    """The samples of a run that is no pipeline; nothing where none are stored."""
    if run.is_pipeline or not run.stages[0].samples:
        return []
    rows = run.stages[0].samples
    kept = choose(rows)
    counts = Counter(_verdict(row) for row in kept)
    subsets = sorted({str(row["subset"]) for row in kept if row.get("subset")})
    buttons = [
        f'<button type="button" data-verdict="" aria-pressed="true">all {len(kept)}</button>'
    ]
    buttons += [
        f'<button type="button" data-verdict="{escape(name, quote=True)}" aria-pressed="false">'
        f"{escape(_words(name))} {count}</button>"
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    choice = ""
    if len(subsets) > 1:
        options = "".join(f"<option>{escape(name)}</option>" for name in subsets)
        choice = (
            f'<select aria-label="Subset"><option value="">every subset</option>{options}</select>'
        )
    filters = (
        f'<div class="filters" id="filters" hidden>{"".join(buttons)}{choice}'
        '<label><input type="checkbox"> cut off</label>'
        '<input type="search" placeholder="words in the sample" aria-label="Words in the sample">'
        '<span id="count" class="dim" role="status"></span></div>'
    )
    shared = _shared_beginnings(rows)
    samples = "".join(_sample(row, shared.get(str(row.get("kind")), "")) for row in kept)
    return [
        f"<style>{STYLE}</style>",
        f'<p class="note">{escape(_note(len(kept), len(rows)))}</p>',
        filters,
        f'<div class="samples" id="samples">{samples}</div>',
        f"<script>{SCRIPT}</script>",
    ]


def choose(rows: Sequence[Mapping]) -> list[Mapping]:
    """At most MAX_SAMPLES rows and MAX_CHARS characters: verdicts in turns, many problems rather than
    many samples of one."""
    queues: dict[str, list[int]] = {}
    order = sorted(range(len(rows)), key=lambda i: (number(rows[i].get("sample")) or 0, i))
    for i, row in ((i, rows[i]) for i in order):
        queues.setdefault(_verdict(row), []).append(i)
    kept: list[int] = []
    room, depth = MAX_CHARS, 0
    while len(kept) < min(MAX_SAMPLES, len(rows)):
        for queue in queues.values():
            if depth >= len(queue) or len(kept) == MAX_SAMPLES:
                continue
            room -= _size(rows[queue[depth]])
            if room < 0:
                return [rows[i] for i in sorted(kept)]
            kept.append(queue[depth])
        depth += 1
    return [rows[i] for i in sorted(kept)]


def _size(row: Mapping) -> int:
    prompt, response = shown(row.get("prompt")), shown(row.get("text"))
    return min(len(prompt), MAX_PROMPT) + min(len(response), MAX_RESPONSE) + 500


def _note(num_kept: int, num_rows: int) -> str:
    rest = f"Texts over {MAX_RESPONSE:,} characters are cut in the middle; samples.jsonl has them in full."
    if num_kept == num_rows:
        return f"All {num_rows:,} samples. {rest}"
    return (
        f"{num_kept:,} of {num_rows:,} samples, so that the page stays small: every verdict in turn, so "
        f"their shares here are not those of the run; first samples of many problems before more of one. {rest}"
    )


def _verdict(row: Mapping) -> str:
    return str(row.get("outcome") or row.get("verdict") or "unverified")


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")


def _shared_beginnings(rows: Sequence[Mapping]) -> dict[str, str]:
    """What the prompts of a kind all begin with, up to a line's end: a preset's wording, no question."""
    prompts: dict[str, set[str]] = {}
    for row in rows:
        prompts.setdefault(str(row.get("kind")), set()).add(shown(row.get("prompt")))
    shared = {}
    for kind, texts in prompts.items():
        low, high = min(texts), max(texts)  # all others lie between
        same = next((i for i, c in enumerate(low) if not high.startswith(c, i)), len(low))
        shared[kind] = low[: low.rfind("\n", 0, same) + 1] if len(texts) > 1 else ""
    return shared


def _sample(row: Mapping, shared: str) -> str:
    verdict = _verdict(row)
    good = verdict in ("correct", "win")
    style = "ok" if good else "dim" if verdict in ("unverified", "tie") else "no"
    mark = "✓ " if good else "" if style == "dim" else "✗ "
    cut = row.get("finish_reason") == "length"
    prompt, answer, extracted = (shown(row.get(k)) for k in ("prompt", "answer", "extracted"))
    facts = []
    if answer and not good:
        facts.append(f"read {_cut(extracted, 24) or 'nothing'}, expected {_cut(answer, 24)}")
    facts.append(f"#{shown(row.get('sample'))}")
    if (tokens := number(row.get("num_tokens"))) is not None:
        facts.append(f"{tokens:,.0f} tokens")
    facts += ["cut off"] * cut
    name = shown(row.get("problem_id"))
    parts = [
        f"<h4>{escape(name)}{escape(' · ' + shown(row.get('subset'))) if row.get('subset') else ''}</h4>"
        f"<pre>{escape(_cut_middle(prompt, MAX_PROMPT))}</pre>",
        f"<h4>Response</h4><pre>{escape(_cut_middle(shown(row.get('text')), MAX_RESPONSE))}</pre>",
    ]
    if row.get("instructions"):
        checks = zip(row["instructions"], row["followed"], row["followed_loosely"], strict=True)
        items = "".join(
            f'<li><span class="{"ok" if strict else "no"}">{"✓" if strict else "✗"}</span> '
            f"{escape(name)}{' (loosely followed)' if loose and not strict else ''}</li>"
            for name, strict, loose in checks
        )
        parts.append(f'<h4>Instructions</h4><ul class="checks">{items}</ul>')
    elif answer or extracted:
        read = escape(_cut_middle(extracted, MAX_PROMPT)) or "nothing"
        expected = f"; expected {escape(answer)}" if answer else ""
        why = f"; {escape(shown(row['why']))}" if row.get("why") else ""
        parts.append(
            f"<h4>Read: {read if len(read) < 200 else 'the text above'}{expected}{why}</h4>"
        )
        parts[-1] = parts[-1].replace("<h4>", '<h4 style="padding-bottom:10px">')
    return (
        f'<details class="sample" data-verdict="{escape(verdict, quote=True)}" '
        f'data-subset="{escape(shown(row.get("subset")), quote=True)}" data-cut="{int(cut)}">'
        f'<summary><span class="{style}">{escape(mark + _words(verdict))}</span>'
        f'<span class="q"><span class="dim">{escape(_cut(name, 40))}</span> '
        f"{escape(_cut(prompt.removeprefix(shared), 160))}</span>"
        f'<span class="facts">{escape(" · ".join(facts))}</span></summary>{"".join(parts)}</details>'
    )


def _cut(value: str, room: int) -> str:
    value = " ".join(value.split())
    return value if len(value) <= room else value[: room - 1] + "…"


def _cut_middle(value: str, room: int) -> str:
    if len(value) <= room:
        return value
    head = room // 2
    return (
        f"{value[:head]}\n… [{len(value) - room:,} characters left out] …\n{value[head - room :]}"
    )
