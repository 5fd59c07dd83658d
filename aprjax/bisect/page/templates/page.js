"use strict";
// Everything is put into the page as text nodes and attributes: names and tokens come from files that nobody vouches for.

// The namespace of SVG is an address; the page has none in its text, so that a search for one finds nothing.
const drawing = Object.assign(document.createElement("template"), { innerHTML: "<svg></svg>" }).content.firstChild.namespaceURI;
const drawn = new Set(["svg", "rect", "line", "text"]);

function make(tag, attributes, ...children) {
  const element = drawn.has(tag) ? document.createElementNS(drawing, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// As `formats.number` in Python writes them.
function number(value, digits = 4) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return minus(size < 10000 ? String(value) : value.toLocaleString("en").replaceAll(",", "\u202f"));
  if (size < 1e-3 || size >= 1e6) {
    const [mantissa, exponent] = value.toExponential(Math.max(digits - 2, 1)).split("e");
    return minus(mantissa + "e" + Number(exponent));
  }
  if (size >= 10 ** digits) return minus(Math.round(value).toLocaleString("en").replaceAll(",", "\u202f"));
  return minus(String(Number(value.toPrecision(digits))));
}
const minus = (text) => text.replaceAll("-", "\u2212");

// --- light and dark -------------------------------------------------------------------------------------------
{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  try {
    const kept = localStorage.getItem("aprjax-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* a page from disk may have no storage: the choice then lasts as long as the page */ }
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("aprjax-theme", root.dataset.theme); } catch { /* see above */ }
    show();
  });
  show();
}

// --- the tip ---------------------------------------------------------------------------------------------------
const tip = document.getElementById("tip");
let tipped = null;
function showTip(target, text) {
  tipped = target;
  tip.textContent = text;
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  const left = Math.min(Math.max(6, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 6);
  const above = box.top - tip.offsetHeight - 9;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : box.bottom + 9) + "px";
}
function hideTip() { tip.hidden = true; }
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
// Moving by keyboard may scroll: the tip then goes with its element. Under a mouse that stands still it would be of something else.
addEventListener("scroll", () => {
  if (tip.hidden) return;
  if (tipped === document.activeElement) showTip(tipped, tip.textContent);
  else hideTip();
}, { passive: true, capture: true });

// --- arrays of half floats ---------------------------------------------------------------------------------------
function halves(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length >> 1 }, (_, index) => {
    const bits = view.getUint16(2 * index, true);
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const rest = bits & 1023;
    if (exponent === 31) return rest ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + rest / 1024) * 2 ** (exponent - 15) : rest * 2 ** -24);
  });
}

// The plots of a stage's details, in units of their own.
const WIDE = 320;
const HIGH = 84;

// --- heat maps ---------------------------------------------------------------------------------------------------
for (const view of document.querySelectorAll("[data-heat]")) heatMap(view);

function heatMap(view) {
  const data = JSON.parse(view.querySelector('script[type="application/json"]').textContent);
  const table = view.querySelector(".heat");
  const detail = view.querySelector(".detail");
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("[role=gridcell]")]);
  const cells = rows.flat();
  let active = null;

  const text = (cell) => {
    const found = data.cells[cell.dataset.cell];
    const [layer, stage] = parted(cell.dataset.cell);
    const place = (layer < 0 ? "" : `layer ${layer}, `) + stage;
    if (found.unmeasured) return `${place}\nunmeasured: ${found.unmeasured}`;
    const lines = [place];
    if (found.verdict) lines.push(`${found.verdict}, worst position ${number(found.local, 3)}`);
    else lines.push(`local ${number(found.local, 3)}, running ${number(found.free, 3)}`, `std ratio ${number(found.ratio)}, cosine ${number(found.cosine, 6)}`);
    return lines.join("\n");
  };
  const focus = (cell, move) => {
    if (active) active.tabIndex = -1;
    active = cell;
    cell.tabIndex = 0;
    if (move) cell.focus();
  };
  const open = (cell) => {
    for (const other of cells) other.setAttribute("aria-selected", String(other === cell));
    detail.replaceChildren(...details(cell.dataset.cell, data.cells[cell.dataset.cell], data));
  };
  for (const cell of cells) {
    cell.addEventListener("click", () => { focus(cell, true); open(cell); });
    cell.addEventListener("pointerenter", () => showTip(cell, text(cell)));
    cell.addEventListener("pointerleave", hideTip);
    cell.addEventListener("focus", () => { focus(cell, false); if (cell.matches(":focus-visible")) showTip(cell, text(cell)); });
    cell.addEventListener("blur", hideTip);
  }
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("[role=gridcell]");
    if (!cell || event.altKey || event.metaKey) return;
    const row = rows.findIndex((line) => line.includes(cell));
    const column = rows[row].indexOf(cell);
    // A row of the stages outside the layers has few, wide cells.
    const near = (line) => rows[line][Math.min(rows[line].length - 1, Math.floor((column * rows[line].length) / rows[row].length))];
    const last = rows.length - 1;
    let next = null;
    if (event.key === "ArrowRight") next = rows[row][column + 1];
    else if (event.key === "ArrowLeft") next = rows[row][column - 1];
    else if (event.key === "ArrowDown") next = row < last ? near(row + 1) : null;
    else if (event.key === "ArrowUp") next = row > 0 ? near(row - 1) : null;
    else if (event.key === "Home") next = event.ctrlKey ? cells[0] : rows[row][0];
    else if (event.key === "End") next = event.ctrlKey ? cells.at(-1) : rows[row].at(-1);
    else if (event.key === "Enter" || event.key === " ") open(cell);
    else return;
    event.preventDefault();
    if (next) focus(next, true);
  });
  for (const radio of view.querySelectorAll(".measures input")) radio.addEventListener("change", () => { table.dataset.measure = radio.value; });
  const shown = cells.find((cell) => cell.dataset.cell === data.shown) || cells[0];
  focus(shown, false);
  open(shown);
}

function parted(key) {
  const at = key.indexOf(":");
  return [Number(key.slice(0, at)), key.slice(at + 1)];
}

function details(key, found, data) {
  const [layer, stage] = parted(key);
  const parts = [make("h4", {}, (layer < 0 ? "" : `layer ${layer}, `) + stage)];
  if (found.unmeasured) return [...parts, make("p", { class: "why" }, `Unmeasured: ${found.unmeasured}.`)];
  const token = (position) => (data.tokens && data.tokens[position] !== undefined ? ` “${data.tokens[position]}”` : "");
  const list = make("dl", {});
  const say = (name, value) => { if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, value)); };
  if (found.verdict) {
    say("verdict", found.verdict);
    say("by", found.by);
    say("worst position", number(found.local));
    say("rounding explains", found.tolerance === null ? null : number(found.tolerance));
    say("all positions", number(found.rel_l2));
    say("unequal values", found.mismatches === null ? null : `${number(found.mismatches)} of ${number(found.count)}`);
    say("largest, in last places", found.max_ulps === null ? null : number(found.max_ulps));
  } else {
    say("local rel L2", found.local === 0 ? "0, equal to the bit" : number(found.local));
    say("rounding explains", found.tolerance === null ? null : number(found.tolerance));
    say("from the arithmetic", found.arithmetic_rel_l2 === null ? null : number(found.arithmetic_rel_l2));
    say("running rel L2", found.free === 0 ? "0, equal to the bit" : number(found.free));
    say("std ratio", number(found.ratio));
    say("rms ratio", number(found.rms_ratio));
    say("cosine", number(found.cosine, 7));
    say("off by > 0.1 %", found.share_1e3 === null ? null : number(100 * found.share_1e3, 3) + " %");
    say("off by > 0.5 %", found.share_5e3 === null ? null : number(100 * found.share_5e3, 3) + " %");
  }
  say("max |Δ|", number(found.max_abs));
  if (found.at && found.at[0] !== null && found.max_abs) say("at", `position ${found.at[0]}${token(found.at[0])}, channel ${found.at[1]}`);
  if (found.massive && found.massive.length) {
    say("massive channels", found.massive.slice(0, 6).join(", "));
    say("running, without them", number(found.rest));
  }
  parts.push(list);
  if (found.through && found.through.length) parts.push(make("p", { class: "hint" }, `Computed through ${found.through.join(", ")}, which the trace lacks.`));
  if (found.reason) parts.push(make("p", {}, found.reason));
  for (const [name, words] of [["local", "Local difference"], ["free", "Running difference"]]) {
    const spread = found.spread && found.spread[name];
    if (spread) parts.push(...spreadParts(spread, words, data, token));
  }
  return parts;
}

function spreadParts(spread, words, data, token) {
  const logs = halves(spread.log2_rel_l2_by_position);
  const values = logs.map((value) => 2 ** value);
  const say = (index) => {
    const position = data.positions ? data.positions[index] : index;
    return `position ${position}${token(position)}: ${values[index] === 0 ? "equal to the bit" : number(values[index], 3)}`;
  };
  const parts = [make("h5", {}, `${words} by position`), logBars(values, say, `${words} by position, logarithmic`)];
  const worst = values.map((value, index) => [value, index]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]).slice(0, 5);
  if (worst.length && values.length > 1) parts.push(make("p", { class: "hint" }, `Largest: ${worst.map(([, index]) => say(index)).join("; ")}.`));
  const groups = halves(spread.share_by_group);
  const size = spread.width / groups.length;
  const from = (index) => Math.floor(index * size);
  if (groups.length > 1 && groups.every(Number.isFinite)) {
    const group = (index) => `channels ${from(index)} to ${from(index + 1) - 1}: ${number(100 * groups[index], 3)} % of the squared difference`;
    parts.push(make("h5", {}, `${words} by channel, ${groups.length} groups of ${spread.width}`), shareBars(groups, group, `${words} by channel`));
  }
  if (spread.channels.length) {
    const head = make("tr", {}, make("th", {}, "channel"), make("th", { class: "number" }, "share"));
    const rows = spread.channels.slice(0, 6).map(([channel, share]) => make("tr", {}, make("td", {}, String(channel)), make("td", { class: "number" }, number(100 * share, 3) + " %")));
    parts.push(make("details", {}, make("summary", {}, "Largest channels"), make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  }
  return parts;
}

function framed(label, count, shape, say) {
  const svg = make("svg", { viewBox: `-34 -4 ${WIDE + 36} ${HIGH + 10}`, role: "img", "aria-label": label });
  svg.append(...shape);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * (WIDE + 36) - 34;
    const index = Math.min(count - 1, Math.max(0, Math.floor((at / WIDE) * count)));
    showTip({ getBoundingClientRect: () => ({ left: event.clientX, width: 0, top: event.clientY, bottom: event.clientY }) }, say(index));
  });
  svg.addEventListener("pointerleave", hideTip);
  return svg;
}

function bars(count, height, colour) {
  const step = WIDE / count;
  const wide = Math.max(0.6, Math.min(0.86 * step, 16));
  return Array.from({ length: count }, (_, index) => {
    const high = height(index);
    return high === null ? null : make("rect", { x: (index + 0.5) * step - wide / 2, y: HIGH - high, width: wide, height: high, style: `fill:${colour}` });
  }).filter(Boolean);
}

function axis(marks) {
  return marks.flatMap(([y, label]) => [
    make("line", { class: "grid", x1: 0, x2: WIDE, y1: y, y2: y }),
    make("text", { class: "tick", x: -4, y: y + 3.5, style: "font-size:9px" }, label),
  ]);
}

function logBars(values, say, label) {
  const logs = values.filter((value) => value > 0 && Number.isFinite(value)).map(Math.log10);
  const low = Math.floor(Math.min(...logs, 0) - 0.2);
  const high = Math.max(low + 1, Math.ceil(Math.max(...logs, low)));
  const place = (log) => ((log - low) / (high - low)) * HIGH;
  const every = Math.max(1, Math.ceil((high - low) / 4));
  const marks = [];
  for (let power = low; power <= high; power += every) marks.push([HIGH - place(power), power < -2 || power > 3 ? minus("1e" + power) : String(10 ** power)]);
  // Equal to the bit has no bar; what is no number reaches the top.
  const height = (index) => (values[index] === 0 ? null : Number.isFinite(values[index]) ? Math.max(1, place(Math.log10(values[index]))) : HIGH);
  return framed(label, values.length, [...axis(marks), ...bars(values.length, height, "var(--s0)")], say);
}

function shareBars(shares, say, label) {
  const top = Math.max(...shares, 1e-9);
  const marks = [[HIGH, "0"], [0, number(100 * top, 2) + " %"]];
  return framed(label, shares.length, [...axis(marks), ...bars(shares.length, (index) => (shares[index] / top) * HIGH, "var(--s1)")], say);
}

// --- strips of tokens, and whatever else has a tip -----------------------------------------------------------------
for (const strip of document.querySelectorAll(".strip")) {
  const tokens = [...strip.children];
  strip.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(event.target);
    if (at < 0) return;
    const flips = (step) => { for (let n = at + step; n >= 0 && n < tokens.length; n += step) if (tokens[n].matches(".bad,.near")) return n; return at; };
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: flips(1), ArrowUp: flips(-1), Home: 0, End: tokens.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const token = tokens[Math.min(tokens.length - 1, Math.max(0, next))];
    tokens[at].tabIndex = -1;
    token.tabIndex = 0;
    token.focus();
  });
  strip.addEventListener("focusin", (event) => {
    for (const token of tokens) token.setAttribute("aria-selected", String(token === event.target));
    if (event.target.matches(":focus-visible")) showTip(event.target, event.target.dataset.tip);
  });
  strip.addEventListener("focusout", hideTip);
}
addEventListener("pointerover", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(target, target.dataset.tip);
});
addEventListener("pointerout", (event) => { if (event.target.closest("[data-tip]")) hideTip(); });

// --- print: nothing stays folded -----------------------------------------------------------------------------------
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
// A link to a folded place opens it.
function unfold() {
  const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  for (let one = target; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
}
addEventListener("hashchange", unfold);
unfold();
