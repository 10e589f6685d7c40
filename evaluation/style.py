"""The look of the report: one style sheet, light and dark by the reader's setting, light on paper."""

from evaluation.markup import Markup

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""A browser that opens the report loads nothing and runs nothing, whatever a model wrote."""

_LIGHT = """
  color-scheme: light;
  --paper: #faf9f7; --card: #ffffff; --ink: #1d1c1a; --muted: #66645e; --line: #e3e1da; --grid: #eceae4;
  --accent: #1f5fae; --good: #157f52; --mixed: #9a6700; --bad: #b3362b; --note: #fff4d6; --note-ink: #5c4300;
  --base: #85827a; --sft: #2a78d6; --init: #16936a; --ppo: #dd5a22; --gold: #b57d00; --reward: #5b49bd;
  --c1: #2a78d6; --c2: #dd5a22; --c3: #16936a; --c4: #5b49bd; --c5: #b57d00; --c6: #c0417f;
"""
_DARK = """
  color-scheme: dark;
  --paper: #161615; --card: #1f1f1d; --ink: #edece8; --muted: #a3a199; --line: #383732; --grid: #2c2b28;
  --accent: #7fb2f0; --good: #4cc38a; --mixed: #e3b341; --bad: #f0776a; --note: #3a2f10; --note-ink: #f5dc97;
  --base: #a09d95; --sft: #5598e7; --init: #2fb587; --ppo: #ef7a45; --gold: #d9a21b; --reward: #a094f2;
  --c1: #5598e7; --c2: #ef7a45; --c3: #2fb587; --c4: #a094f2; --c5: #d9a21b; --c6: #e578ad;
"""

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.synthetic { margin: 0; max-width: none; padding: .7rem 1.25rem; background: var(--note); color: var(--note-ink);
  text-align: center; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 2.1rem; line-height: 1.15; margin: 0 0 .3rem; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 3.2rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1.08rem; margin: 2rem 0 .3rem; }
h4 { font-size: .82rem; margin: 1.6rem 0 .6rem; color: var(--muted); text-transform: uppercase;
  letter-spacing: .06em; }
p { margin: .4rem 0 .8rem; max-width: 74ch; }
a { color: var(--accent); text-underline-offset: .15em; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow: auto;
  max-height: 32rem; line-height: 1.45; margin: .5rem 0 1rem; }
.lede { font-size: 1.08rem; color: var(--muted); margin: 0 0 1rem; }
.absent, .fine { color: var(--muted); font-size: .9rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: .7rem 0; margin-top: 1rem; font-size: .92rem;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.facts { display: flex; flex-wrap: wrap; gap: .15rem 1.5rem; margin: .2rem 0 0; font-size: .92rem;
  color: var(--muted); }
.facts b { color: var(--ink); font-weight: 600; }

.verdict { background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--muted);
  border-radius: 10px; padding: 1.3rem 1.5rem 1.1rem; margin-top: 1.6rem; }
.verdict.good { border-left-color: var(--good); } .verdict.good h2 { color: var(--good); }
.verdict.mixed { border-left-color: var(--mixed); } .verdict.mixed h2 { color: var(--mixed); }
.verdict.bad { border-left-color: var(--bad); } .verdict.bad h2 { color: var(--bad); }
.verdict h2 { margin: 0 0 .35rem; font-size: 1.75rem; }
.verdict .question { margin: 0; font-size: .82rem; color: var(--muted); text-transform: uppercase;
  letter-spacing: .06em; }
.verdict h3 { margin: 1.3rem 0 .5rem; font-size: .95rem; }

.intervals { margin: .6rem 0 1rem; }
.interval { display: grid; grid-template-columns: minmax(11rem, 17rem) 1fr minmax(9.5rem, auto); gap: 0 .9rem;
  align-items: center; font-size: .93rem; }
.interval-label { line-height: 1.25; }
.interval.under .interval-label { color: var(--muted); padding-left: 1rem; }
.interval.under + .interval:not(.interval-axis) { margin-top: .55rem; }
.interval-text { text-align: right; font-variant-numeric: tabular-nums; color: var(--muted); white-space: nowrap; }
.interval-text b { color: var(--ink); }
.strip { width: 100%; height: 32px; display: block; overflow: visible; }
.strip.ticks { height: 20px; }
.strip text, .chart text { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
.whisker { stroke-width: 3; stroke-linecap: round; }
.dot { stroke: var(--card); stroke-width: 2; }
.ring { fill: var(--card) !important; stroke-width: 2.5; }
.bar { fill: var(--c1); opacity: .8; }
.grid { stroke: var(--grid); } .base { stroke: var(--line); }
.reference { stroke: var(--muted); stroke-dasharray: 4 3; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart .axis { font-size: 11px; }
.curve { fill: none !important; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.hit { opacity: 0; } .hit:hover { opacity: 1; }
.mean { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
.fill { opacity: .75; stroke: none !important; }
"""

_RULES_2 = """
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 1rem; }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
.panel { margin: 0; padding: .85rem .9rem .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; display: flex; flex-direction: column; break-inside: avoid; }
.panel figcaption { flex: 1; font-size: .84rem; line-height: 1.35; color: var(--muted); margin-bottom: .45rem; }
.panel figcaption strong { display: block; font-size: .95rem; color: var(--ink); overflow-wrap: anywhere; }
.key { display: inline-block; margin: .2rem .9rem 0 0; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: .9rem; height: .22rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: middle; }
.key b { color: var(--ink); font-weight: 600; }

.scroll { overflow-x: auto; margin: .6rem 0 1rem; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); font-size: .84rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.of-words { width: fit-content; max-width: 100%; } .of-words th, .of-words td { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
td small { color: var(--muted); font-size: .84em; }
.model::before { content: ""; display: inline-block; width: .62rem; height: .62rem; border-radius: 50%;
  margin-right: .45rem; background: currentColor; }
.model { font-weight: 600; } .model span { color: var(--ink); }

.exchange { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0;
  break-inside: avoid; }
.prompt { padding: .8rem 1.1rem; border-bottom: 1px solid var(--line); }
.prompt small { display: block; color: var(--muted); font-size: .75rem; text-transform: uppercase;
  letter-spacing: .06em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow: auto;
  /* a shadow at an edge beyond which there is more to scroll to */
  background: linear-gradient(var(--card), var(--card)) 0 0 / 100% .8rem local no-repeat,
    linear-gradient(var(--card), var(--card)) 0 100% / 100% .8rem local no-repeat,
    linear-gradient(#0003, #0000) 0 0 / 100% .5rem scroll no-repeat,
    linear-gradient(#0000, #0003) 0 100% / 100% .5rem scroll no-repeat; }
.prompt .text { font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
.answer { padding: .8rem 1.1rem; border-left: 1px solid var(--line); margin-left: -1px; display: flex;
  flex-direction: column; }
.answer .text { flex: 1; margin: .3rem 0 .6rem; }
.scores { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .84rem; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.scores b { color: var(--ink); font-weight: 600; }
.scores .best b { color: var(--good); }
.scores .best b::after { content: " ▲"; font-size: .7em; }

.flow { display: flex; flex-wrap: wrap; gap: .45rem; list-style: none; padding: 0; margin: 1rem 0 0;
  font-size: .87rem; }
.flow li { border: 1px solid var(--line); background: var(--card); border-radius: 999px; padding: .12rem .75rem; }
.flow li b { font-weight: 600; } .flow .absent { border-style: dashed; opacity: .75; }
.flow .unfinished { border-color: var(--mixed); color: var(--mixed); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .45rem 1.2rem; max-width: 86ch; }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
.hash { font-size: .8em; color: var(--muted); }
footer { margin-top: 3.5rem; padding-top: 1rem; padding-bottom: 3rem; border-top: 1px solid var(--line);
  color: var(--muted);
  font-size: .88rem; }

@media (max-width: 640px) {
  body { font-size: 15.5px; }
  h1 { font-size: 1.7rem; } .verdict h2 { font-size: 1.4rem; } .verdict { padding: 1rem 1rem .8rem; }
  header, main, footer { padding-left: .9rem; padding-right: .9rem; }
  .interval { grid-template-columns: 1fr auto; margin-bottom: .5rem; }
  .interval .strip { grid-row: 2; grid-column: 1 / -1; }
  .interval-axis .strip { grid-row: 1; } .interval-axis span { display: none; }
  .answer + .answer { border-top: 1px solid var(--line); }
  td small { display: block; white-space: normal; width: 8rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .7rem; }
}
@media print {
  :root { --paper: #ffffff; }
  @page { margin: 13mm; }
  html { font-size: 11.5px; } body { font-size: 11.5px; } nav, .hit { display: none; }
  header, main, footer { max-width: none; padding: 0; }
  .synthetic { border-bottom: 1px solid var(--line); } h2 { margin-top: 2rem; }
  .interval { grid-template-columns: 13rem 1fr 11rem; } .interval .strip { grid-row: auto; grid-column: auto; }
  .interval-axis span { display: block; } .strip { height: 24px; }
  .panels { grid-template-columns: repeat(3, 1fr); } .panels.small { grid-template-columns: repeat(4, 1fr); }
  .answers { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
  .answer + .answer { border-top: 0; }
  .scroll { overflow: visible; } th, td { white-space: normal; padding: .35rem .6rem; } td small { display: block; }
  tr, .interval { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .text, pre { max-height: none; overflow: visible; } pre { white-space: pre-wrap; }
  h2, h3, h4 { break-after: avoid; }
}
"""


def style_sheet() -> Markup:
    """The CSS of the report."""
    names = ("base", "sft", "init", "ppo", "gold", "reward", "c1", "c2", "c3", "c4", "c5", "c6")
    colours = "\n".join(
        f".is-{name} {{ color: var(--{name}); }} i.is-{name} {{ background: var(--{name}); }}"
        f" svg .is-{name} {{ fill: var(--{name}); stroke: var(--{name}); }}"
        for name in names
    )
    return Markup(
        f":root {{{_LIGHT}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}\n"
        f"{_RULES}{_RULES_2}{colours}"
    )
