"""How the pages of a run look: light and dark, on a screen and on paper."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--page:#fff;--ground:#f4f6f8;--card:#fff;--line:#d5dce3;
--text:#17212b;--soft:#5b6875;--link:#55677a;--ok:#0072b2;--ok-ground:#eef6fb;
--bad:#c14a00;--bad-ground:#fdeee2;--open:#77838f;--open-ground:#f3f4f5;
--hand:#7b3f98;--sign:#fff}
@media(prefers-color-scheme:dark){:root{--page:#10151b;--ground:#171e26;--card:#1c252e;
--line:#33404d;--text:#e7ecf1;--soft:#a0aebb;--link:#91a3b5;--ok:#5cb6ec;--ok-ground:#14293a;
--bad:#ff9a57;--bad-ground:#3b2314;--open:#8e9aa6;--open-ground:#1f272f;
--hand:#c695e0;--sign:#10151b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{margin:0 auto;padding:32px 24px 48px}
main>*{max-width:1180px}main>figure,main>.verdict{max-width:none}
h1{font-size:26px;line-height:1.25;margin-top:0;margin-bottom:4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px}
p{margin-top:0;margin-bottom:8px}section>p{max-width:80ch}
.soft{color:var(--soft)}
.verdict{display:flex;gap:12px;align-items:flex-start;margin-top:18px;
margin-bottom:22px;padding:12px 16px;
border:1px solid;border-left-width:6px;border-radius:8px;overflow-wrap:anywhere}
.verdict.ok{border-color:var(--ok);background:var(--ok-ground)}
.verdict.bad{border-color:var(--bad);background:var(--bad-ground)}
.verdict b{display:block}.verdict ul{margin:6px 0 2px;padding-left:18px}
.verdict svg{flex:none;margin-top:2px}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:12px}
.wide svg{display:block;width:100%;margin:0 auto}
figure{margin:0}
figcaption,.legend{color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin:10px 2px 4px;padding:0;list-style:none}
.legend li{display:flex;gap:7px;align-items:center}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 20px;margin:0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:600;white-space:nowrap}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
td{overflow-wrap:anywhere}
.all td{white-space:nowrap}tr:target td{background:var(--ok-ground)}
.number{text-align:right;font-variant-numeric:tabular-nums}
code,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font-size:12.5px}
td.outcome{white-space:nowrap;font-weight:600}
.outcome.ok{color:var(--ok)}.outcome.bad{color:var(--bad)}.outcome.open{color:var(--open)}
summary{cursor:pointer;color:var(--link)}
svg text{font-size:12px;fill:var(--text)}
svg .strong{font-size:13px;font-weight:600}
svg .small{font-size:12px}
svg .soft,svg .none{fill:var(--soft)}
svg .none{font-style:italic}
svg .mono{font-size:11px}
svg .head,svg .tick,svg .badge{text-anchor:middle;fill:var(--soft)}
svg .head{font-size:12px}svg .tick{font-size:10.5px}
svg .badge{font-size:11px;font-weight:600;fill:var(--sign)}
svg .end{text-anchor:end;font-size:11px}
svg .panel{fill:var(--ground)}
svg .card{stroke-width:1.2}
svg .card.ok{fill:var(--ok-ground);stroke:var(--ok)}
svg .card.bad{fill:var(--bad-ground);stroke:var(--bad);stroke-width:2.4}
svg .card.open{fill:var(--open-ground);stroke:var(--open);stroke-dasharray:5 3}
svg .stripe{stroke-width:4;stroke-linecap:round}
svg .stripe.ok{stroke:var(--ok)}svg .stripe.bad{stroke:var(--bad)}
svg .stripe.open{stroke:var(--open)}
svg .dot.ok{fill:var(--ok)}svg .dot.bad{fill:var(--bad)}svg .dot.open{fill:var(--open)}
svg .sign{fill:none;stroke:var(--sign);stroke-width:1.8;stroke-linecap:round;
stroke-linejoin:round}
svg .thin.ok{fill:var(--ok);opacity:.72}
svg .thin.bad{fill:var(--bad);stroke:var(--bad);stroke-width:2}
svg .thin.open{fill:var(--open-ground);stroke:var(--open);stroke-dasharray:3 2}
svg .missing{fill:none;stroke:var(--bad);stroke-width:1.6;stroke-dasharray:6 4}
svg .rail{fill:var(--line)}svg .full{fill:var(--ok)}svg .little{fill:var(--bad)}
svg .least{stroke:var(--text);stroke-width:1.4}
svg .handed{fill:var(--hand)}
svg .arrow,svg .link{fill:none;stroke:var(--link);stroke-width:1.6}
svg .arrow{marker-end:url(#tip)}
svg .far{stroke-width:1.6}
svg .faint{stroke:var(--line)}
svg .broken{stroke:var(--bad);stroke-width:2.2;stroke-dasharray:4 3;marker-end:url(#broken)}
svg #tip path{fill:var(--link)}svg #broken path{fill:var(--bad)}
svg a{text-decoration:none}
svg a:hover .card,svg a:focus .card{stroke-width:2.4}
@media print{@page{size:A4 landscape;margin:12mm}main{max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.wide{overflow:visible;border:0}.wide svg{min-width:0!important}
h2{break-after:avoid}tr,figure,.verdict{break-inside:avoid}}
"""
