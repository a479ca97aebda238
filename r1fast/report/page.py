"""The report's page: its style sheet and the pieces of HTML that several sections use."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--fg:#1d1f23;--muted:#646a73;--line:#e3e3de;
--soft:#f1f1ed;--good:#1f7a45;--bad:#b3261e;--wait:#fce8a6;--wait-fg:#5d4300;--target:#2f6db3;
--other:#b4540a;--c0:#2f6db3;--c1:#c2571a;--c2:#2c8456;--c3:#7d4fa8;--c4:#b8324f;--c5:#1c7f8f;
--c6:#857515;--c7:#6b6f76;--c8:#a8408c;--c9:#4b7d1a}
@media(prefers-color-scheme:dark){:root{--bg:#131519;--card:#1a1d22;--fg:#e4e6ea;--muted:#9aa1ab;
--line:#2d3138;--soft:#23272e;--good:#5fce8f;--bad:#ff8b80;--wait:#4d3d07;--wait-fg:#ffe08a;
--target:#7fb4f0;--other:#f2a05f;--c0:#7fb4f0;--c1:#f2935b;--c2:#63c893;--c3:#bd97e6;--c4:#f2849b;
--c5:#5cc4d3;--c6:#d0bd55;--c7:#a9aeb6;--c8:#e68fce;--c9:#9fd06a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:44px 24px 72px}
h1,h2,h3{line-height:1.25;text-wrap:balance;margin:0}
h1{font-size:30px;font-weight:650;letter-spacing:-.015em}
h2{font-size:19px;font-weight:650;letter-spacing:-.005em;margin:52px 0 6px;padding-top:18px;
border-top:1px solid var(--line)}
h3{font-size:15px;font-weight:600}
p{margin:0 0 12px;max-width:76ch}
.eyebrow{color:var(--muted);font-size:13px;margin:0 0 6px}
.lead{font-size:18px;line-height:1.5;margin:12px 0 4px;max-width:66ch;text-wrap:pretty}
.note,.help{color:var(--muted);font-size:13.5px}
.alert{border-left:3px solid var(--c1);background:var(--soft);padding:8px 14px;margin:16px 0 0;
border-radius:0 6px 6px 0}
.scroll{overflow-x:auto;margin:14px 0;border:1px solid var(--line);border-radius:8px;
background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:8px 12px;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{font-weight:500;color:var(--muted);font-size:12.5px;white-space:nowrap}
tbody th{font-weight:550}
.n{text-align:right;white-space:nowrap}
td.bar{background:linear-gradient(to right,color-mix(in srgb,var(--c0) 17%,transparent)
calc(var(--v)*100%),transparent 0)}
td.none,.dim{color:var(--muted)}
.sub{display:block;color:var(--muted);font-size:12.5px;font-weight:400}
.ok,.no{font-weight:600;white-space:nowrap}.ok{color:var(--good)}.no{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px;
margin:16px 0}
figure{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--line);
border-radius:8px;min-width:0;display:flex;flex-direction:column}
figcaption{margin-bottom:8px}
figcaption .help{display:block;line-height:1.4;font-size:12.5px}
svg{display:block;width:100%;height:auto;overflow:visible;margin-top:auto}
svg text{font-size:10.5px;fill:var(--muted);font-family:inherit}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.edge{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 3;opacity:.6}
.raw,.line{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.38}.line{stroke-width:2.1}
.dot{fill:var(--card);stroke:var(--c);stroke-width:1.7}
svg .tick{text-anchor:end}
svg .stage{text-anchor:middle;fill:var(--c);font-weight:600}
svg .steps{text-anchor:middle}
svg .value{text-anchor:end;fill:var(--c);font-weight:650;font-size:11.5px;paint-order:stroke;
stroke:var(--card);stroke-width:3.5px;stroke-linejoin:round}
.stack{display:flex;height:16px;border-radius:3px;overflow:hidden;background:var(--soft);
min-width:160px}
.stack span{background:var(--c);min-width:1px;border-right:1px solid var(--card)}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;margin:10px 0;padding:0;list-style:none;font-size:13px}
.keys i{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);
margin-right:6px;vertical-align:-1px}
.problem{margin:22px 0 0}
.problem h3{font-weight:600}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(205px,100%),1fr));gap:10px;
margin-top:10px}
.answer{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden;
display:flex;flex-direction:column;min-width:0}
.answer header{padding:7px 12px;font-size:13px;line-height:1.45;border-bottom:1px solid var(--line)}
.answer header>*{display:block}
.answer header b{font-weight:600}
.answer footer{padding:0 12px 8px;color:var(--muted);font-size:12.5px;margin-top:auto}
pre{margin:0;padding:10px 12px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:22em;
overflow-y:auto;font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
mark{color:inherit;background:none;padding:0}
mark.wait{background:var(--wait);color:var(--wait-fg);border-radius:3px;padding:1px 3px;
font-weight:600}
mark.target{color:var(--target)}mark.other{color:var(--other);font-style:italic}
details{margin:12px 0;border:1px solid var(--line);border-radius:8px;background:var(--card)}
summary{cursor:pointer;padding:9px 14px;font-weight:550;font-size:14px}
details .scroll{border:0;border-top:1px solid var(--line);border-radius:0;margin:0}
details tbody th{white-space:nowrap}
details pre{border-top:1px solid var(--line);max-height:36em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 22px;margin:14px 0;font-size:14px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media(max-width:560px){main{padding:26px 14px 48px}h1{font-size:24px}.lead{font-size:16.5px}
h2{margin-top:38px}th,td{padding:7px 9px}}
@media print{main{max-width:none;padding:0}figure,.answer,tr{break-inside:avoid}}
"""


def page(title: str, body: str) -> str:
    """A whole document that needs nothing but itself."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what belongs to it; nothing where there is nothing to say."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def table(label: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of ready HTML cells (`cell`, `text`); the first of each row is its heading.

    Headings after the first `left` columns are set right, over numbers.
    """
    head = "".join(
        f'<th scope="col"{"" if i < left else " class=n"}>{escape(name)}</th>'
        for i, name in enumerate(columns)
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(row[1:])}</tr>' for row in rows if row
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text(value: str) -> str:
    return f"<td>{escape(value)}</td>"


def cell(value: str, share: float | None = None) -> str:
    """A number; `share` draws it as a bar behind the text as well."""
    if value == "":
        return '<td class="n none">–</td>'
    if share is None:
        return f'<td class="n">{escape(value)}</td>'
    return f'<td class="n bar" style="--v:{min(max(share, 0), 1):.3f}">{escape(value)}</td>'


def keys(items: Sequence[tuple[str, int]]) -> str:
    """What the colours stand for."""
    rows = "".join(
        f'<li><i style="--c:var(--c{color})"></i>{escape(name)}</li>' for name, color in items
    )
    return f'<ul class="keys">{rows}</ul>'


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""
