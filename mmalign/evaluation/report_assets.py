"""The style sheet that every page carries inside itself."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #1c1d1f; --muted: #63676d; --line: #e4e4e0;
  --win: #12694c; --loss: #a8431c; --mark: #8a5a00; --mark-paper: #fdf3dc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131416; --card: #1a1b1e; --ink: #e9e9e6; --muted: #a0a4aa; --line: #2d2f33;
    --win: #6bcba3; --loss: #f09a72; --mark: #e8b653; --mark-paper: #2c2411;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1160px; padding: clamp(20px, 4vw, 56px); background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
h1, h2, p, figure, table, dl { margin: 0; }
h2 { font-size: 1.2rem; font-weight: 600; letter-spacing: -0.01em; }
section { margin-top: 56px; }
.quiet { color: var(--muted); font-size: 0.87rem; }
.lead { max-width: 84ch; text-wrap: pretty; margin-top: 4px; }
.eyebrow {
  display: flex; flex-wrap: wrap; gap: 4px 20px; justify-content: space-between; color: var(--muted);
  font-size: 0.87rem; padding-bottom: 12px; border-bottom: 1px solid var(--line);
}
.eyebrow b { color: var(--ink); font-weight: 600; }

.hero { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 12px 48px; align-items: start; margin-top: 40px; }
.rate { font-size: clamp(3.2rem, 8vw, 5rem); line-height: 1; font-weight: 600; letter-spacing: -0.035em; }
.rate small { font-size: 0.5em; font-weight: 500; letter-spacing: 0; margin-left: 0.06em; }
.rate-interval { color: var(--muted); margin-top: 8px; white-space: nowrap; }
.win { color: var(--win); } .loss { color: var(--loss); } .even { color: var(--muted); }
h1 {
  font-size: clamp(1.2rem, 2.2vw, 1.5rem); line-height: 1.4; font-weight: 500; letter-spacing: -0.01em; max-width: 40em;
}
.finding { margin-top: 8px; font-weight: 500; max-width: 84ch; }
.hero .interval { margin-top: 20px; }
.verdict { margin-top: 40px; }
.warn { margin-top: 12px; color: var(--mark); max-width: 72ch; }

table { width: 100%; border-collapse: collapse; margin-top: 16px; }
th { font-weight: 500; font-size: 0.8rem; line-height: 1.35; color: var(--muted); text-align: left; vertical-align: bottom; }
th.number { white-space: nowrap; }
th.wraps { white-space: normal; min-width: 6em; }
th.side-name { white-space: normal; overflow-wrap: anywhere; min-width: 7em; }
th, td { padding: 9px 24px 9px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
tr.last-held-out td, tr:last-child td { border-bottom-color: var(--muted); }
td.name { font-weight: 600; overflow-wrap: anywhere; min-width: 120px; }
td.plot { width: 26%; min-width: 180px; }
tfoot td { border: 0; padding-top: 4px; padding-bottom: 0; }
.tag {
  display: inline-block; font-size: 0.75rem; font-weight: 500; line-height: 1.5; color: var(--mark);
  background: var(--mark-paper); border-radius: 4px; padding: 0 7px; margin-left: 8px; white-space: nowrap;
}
td .unit { display: block; color: var(--muted); font-size: 0.82rem; font-weight: 400; }

.interval, .axis { display: block; overflow: visible; }
.interval .rail { stroke: var(--line); }
.interval .half { stroke: var(--muted); stroke-dasharray: 2 3; }
.interval .span { stroke: var(--ink); stroke-width: 2.5; }
.interval .cap { stroke: var(--ink); stroke-width: 1.5; }
.interval circle { fill: var(--ink); stroke: var(--ink); stroke-width: 2; }
.interval.seen .span, .interval.seen .cap, .interval.seen circle { stroke: var(--muted); }
.interval.seen circle { fill: var(--paper); }
tbody .axis { display: none; }
.axis text { fill: var(--muted); font-size: 11px; }

.gallery, .curves {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 32px 28px;
  margin-top: 20px;
}
.pair { display: flex; flex-direction: column; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; align-items: end; }
.side img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--line); }
.side img.small { image-rendering: pixelated; }
.side .label { display: flex; gap: 6px; font-size: 0.8rem; color: var(--muted); padding-bottom: 4px; }
.side .label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.side .label b { font-weight: 500; color: var(--ink); }
.prompt { margin-top: 8px; font-size: 0.93rem; line-height: 1.4; }
.media { display: grid; grid-template-columns: repeat(auto-fit, minmax(30%, 1fr)); align-items: start; gap: 3px; }
.said { white-space: pre-line; }
.outcome { margin-top: 2px; font-size: 0.82rem; color: var(--muted); }
.toolbar { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: baseline; }
.toolbar h2 { flex: 1; }
.toolbar button, .votes button {
  font: inherit; font-size: 0.87rem; color: var(--ink); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 12px; cursor: pointer;
}
.toolbar button:hover, .votes button:hover { border-color: var(--muted); }
body.blind .outcome, body.blind .side .label { visibility: hidden; }
body.blind .open-only { display: none; }
.votes { display: flex; gap: 8px; margin-top: 8px; }
.votes[hidden], .slider[hidden], .toolbar button[hidden] { display: none; }
.votes button { flex: 1; }
.votes button[aria-pressed="true"] { background: var(--ink); border-color: var(--ink); color: var(--paper); }
:focus-visible, body.slide .pictures:focus-within { outline: 2px solid var(--ink); outline-offset: 2px; }
body.slide .pictures { position: relative; grid-template-columns: minmax(0, 1fr); gap: 0; align-items: stretch; }
body.slide .side, body.slide .slider { grid-area: 1 / 1; }
body.slide .side[data-side="aligned"] .label { justify-content: flex-end; }
body.slide .side[data-side="aligned"] img { clip-path: inset(0 0 0 var(--cut, 50%)); }
body.slide .side .label span { max-width: 30%; }
body.slide .slider { z-index: 1; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
body.slide .pictures::after {
  content: ""; position: absolute; left: var(--cut, 50%); top: 1.6em; bottom: 0; width: 2px; margin-left: -1px;
  background: var(--paper); box-shadow: 0 0 0 1px var(--ink); pointer-events: none;
}
#tally { margin-top: 8px; font-weight: 500; }
#tally:empty { display: none; }

.curve figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 0.87rem; }
.curve .key { font-weight: 600; overflow-wrap: anywhere; }
.curve .plot { display: grid; grid-template-columns: 4.8em 1fr; margin-top: 8px; }
.curve .scale {
  display: flex; flex-direction: column; justify-content: space-between; padding-right: 8px; text-align: right;
  line-height: 1; white-space: nowrap; border-right: 1px solid var(--line);
}
.curve svg { display: block; width: 100%; height: 110px; overflow: visible; }
.curve polyline { fill: none; stroke: var(--ink); stroke-width: 1.5; stroke-linecap: round; stroke-linejoin: round; }
.curve polyline, .curve line { vector-effect: non-scaling-stroke; }
.curve .guide { stroke: var(--muted); stroke-dasharray: 3 4; }
.curve svg.axis { height: 16px; } .wide { overflow-x: auto; }
.wide td, .wide th { padding-right: 12px; } .wide .number { font-size: 0.87rem; }
.curve p { margin-top: 4px; }
.curve .range { display: flex; justify-content: space-between; margin: 3px 0 0 4.8em; }
.curve .plot, .curve p { margin-top: 4px; }
.curve .range { font-size: 0.75rem; color: var(--muted); }
details { margin-top: 20px; } summary { cursor: pointer; color: var(--muted); font-size: 0.87rem; }

ul.notes { margin: 12px 0 0; padding: 0; list-style: none; max-width: 76ch; }
ul.notes li { padding: 8px 0; border-bottom: 1px solid var(--line); }
.settings {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 0 40px; margin-top: 12px;
}
.settings div {
  display: flex; justify-content: space-between; gap: 20px; padding: 6px 0; border-bottom: 1px solid var(--line);
}
.settings dt { color: var(--muted); } .settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
code { font: 0.87em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }

@media (max-width: 900px) {
  section { margin-top: 44px; }
  .hero { grid-template-columns: minmax(0, 1fr); margin-top: 28px; }
  table, tbody, tr, td, tfoot { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { padding: 12px 0; border-bottom: 1px solid var(--line); }
  tfoot { display: none; }
  tbody .axis { display: block; }
  td, td.number {
    display: flex; justify-content: space-between; gap: 16px; border: 0; padding: 2px 0; text-align: right;
  }
  td:empty { display: none; }
  td.name { display: block; text-align: left; }
  td.plot { display: block; width: auto; padding: 6px 0; }
  td[data-label]::before {
    content: attr(data-label); color: var(--muted); text-align: left; white-space: normal; overflow-wrap: anywhere;
  }
}
@media print { .toolbar button, .votes button { display: none; } .pair, .curve { break-inside: avoid; } }
"""
