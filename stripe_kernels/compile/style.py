"""The page's style sheet. Blue and grey differ in lightness too: readers who see no hue lose nothing."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5c6570;--rule:#e3e6ea;--ground:#eceef1;
--stripes:#0b62a8;--dense:#a3abb5}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--soft:#98a2ad;--rule:#2a3037;
--ground:#262c33;--stripes:#63b3f1;--dense:#78828d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 20px 80px}
h1{font-size:26px;line-height:1.2;font-weight:650;letter-spacing:-.01em;margin:0;overflow-wrap:anywhere}
h2{font-size:18px;font-weight:650;margin:0 0 2px}
h3{font-size:13px;font-weight:600;margin:0 0 6px}
header p,.caption{color:var(--soft);margin:4px 0 0;max-width:72ch}
section{margin-top:44px;padding-top:20px;border-top:1px solid var(--rule)}
.caption{margin-bottom:18px;font-size:14px}
small{color:var(--soft);font-size:12px}
code{font:12.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:20px;margin-top:28px}
.figures b{display:block;font-size:28px;font-weight:600;line-height:1.15;letter-spacing:-.01em}
.figures span,.figures small{display:block}
.skeletons{display:flex;flex-wrap:wrap;gap:22px 20px;align-items:flex-end;margin-bottom:22px}
figure{margin:0}
figcaption{font-size:12.5px;margin-top:6px;max-width:184px;line-height:1.35}
figcaption small{display:block}
figcaption .name+small{margin-top:0}
.name{overflow-wrap:anywhere}
svg{display:block;overflow:visible}
.skeleton{shape-rendering:crispEdges}
.skeleton .dead,.taps .dead{fill:var(--ground)}
.skeleton .live{stroke:var(--stripes);stroke-width:1;fill:none}
.taps .live{fill:var(--stripes)}
.taps text{font-size:10.5px;fill:var(--soft);text-anchor:middle}
.layer{display:grid;grid-template-columns:minmax(150px,1.3fr) minmax(120px,1fr) 62px minmax(160px,2fr) 44px;
gap:0 18px;align-items:center;padding:5px 0;border-top:1px solid var(--rule);font-size:13.5px}
.layer.head{border:0;color:var(--soft);font-size:12px;padding:0 0 4px}
.layer>b{text-align:right;font-weight:600}
.layer>span small{white-space:nowrap}
.layer.sum{font-weight:500}
.layer.sum div{font-size:12px;color:var(--soft)}
.bar{display:flex;align-items:center;gap:6px;font-size:12px;line-height:15px}
.bar i{display:block;height:6px;width:calc((100% - var(--room))*var(--share));min-width:2px;border-radius:1px;
background:var(--stripes);flex:none}
.bar span{white-space:nowrap}
.bar.dense i{background:var(--dense)}
.bar.dense span{color:var(--soft)}
.pair{display:grid;grid-template-columns:minmax(110px,190px) 1fr auto;gap:0 14px;align-items:center;padding:3px 0;
font-size:13.5px}
.pair>span{overflow-wrap:anywhere}
.key{display:inline-block;width:10px;height:10px;border-radius:50%;margin:0 5px 0 1px;background:var(--stripes)}
.key.dense{background:none;border:2px solid var(--dense)}
.key.bars{width:18px;height:6px;border-radius:1px;vertical-align:2px}
.key.dense.bars{background:var(--dense);border:0}
.peak{position:relative;align-self:stretch;display:grid;align-items:center}
.peak::before{content:"";position:absolute;left:calc(100%*var(--peak));top:-1px;bottom:-1px;
border-left:1px solid var(--ink)}
.peak+small{min-width:3em;text-align:right;color:var(--ink)}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:24px 44px;align-items:start}
.two .pair{font-size:12.5px;padding:0;line-height:1.35}
.plot{width:100%;max-width:500px;height:auto}
.plot text{font-size:10.5px;fill:var(--soft)}
.plot .tag{fill:var(--ink);stroke:var(--paper);stroke-width:3px;stroke-linejoin:round;paint-order:stroke}
.plot .title{fill:var(--soft);font-weight:600}
.plot .grid{stroke:var(--rule);stroke-width:.8}
.plot .line{fill:none;stroke:var(--dense);stroke-width:.7}
.plot .roof{stroke:var(--ink);stroke-width:1.3}
.plot .link{stroke-opacity:.55}
.plot .spread{stroke:var(--dense);stroke-width:1}
.mark.stripes{fill:var(--stripes)}
.mark.dense,.mark.other{fill:var(--paper);stroke:var(--dense);stroke-width:1.5}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{font-weight:400;font-size:12px;color:var(--soft);text-align:left;padding:0 14px 5px 0;white-space:nowrap}
td{border-top:1px solid var(--rule);padding:5px 14px 5px 0;vertical-align:top;overflow-wrap:anywhere}
th.ms,td.ms{text-align:right;white-space:nowrap}
summary{cursor:pointer}
ul{margin:0;padding-left:18px;font-size:13.5px}
details ul{padding:6px 0 4px 4px;list-style:none;font-size:12.5px;color:var(--soft)}
@media(max-width:640px){
main{padding:24px 10px 60px}
.skeletons{gap:22px 16px}
.layer .kept span::after{content:" kept"}
.layer .kept{--room:6em!important}
.times{margin-top:5px}
.layer{grid-template-columns:1fr 62px 44px;gap:2px 14px;padding:9px 0}
.layer>:nth-child(1){grid-area:1/1/2/2}.layer>:nth-child(2){grid-area:2/1/3/2}
.layer>:nth-child(3){grid-area:1/2/4/3}.layer>:nth-child(4){grid-area:3/1/4/2}.layer>b{grid-area:1/3/4/4}
.layer.head{display:none}
.layer.sum>:nth-child(4){padding:0;margin:0}
.pair{grid-template-columns:minmax(90px,140px) 1fr auto;gap:0 10px}
thead{display:none}
tr{display:grid;grid-template-columns:1fr 1fr 1fr;gap:2px 12px;border-top:1px solid var(--rule);padding:8px 0}
td,td.ms{border:0;padding:0;text-align:left}
td:first-child{font-weight:600}td:not(.ms){grid-column:1/4}
td.ms::before{content:attr(data-head);display:block;color:var(--soft);font-size:11.5px}
}
@media print{details[open] summary{font-weight:600}}
"""
