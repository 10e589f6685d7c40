// Curves as SVG, in the frame and with the rules of the report's (evaluation/figures.py).

import { drawn, element, figure } from "./dom.js";

const [WIDTH, HEIGHT] = [360, 190];
const [TOP, RIGHT, BOTTOM] = [10, 12, 36];
const CHARACTER = 6.3;
const COLOURS = ["is-c1", "is-c2", "is-c3", "is-c4", "is-c5", "is-c6"];
const HOVER_POINTS = 50;

/** The panels of a stage: {name, x, finished, panels}. */
export function stage({ name, x, finished, panels }) {
  return element(
    "div",
    { class: "stage" },
    element("h3", {}, name, finished ? "" : " (under way)"),
    element("div", { class: "panels" }, ...panels.map((panel) => figureOf(panel, x))),
  );
}

function figureOf(panel, x) {
  const several = panel.curves.length > 1;
  const keys = panel.curves.map((curve, index) =>
    element(
      "span",
      { class: "key" },
      several ? element("i", { class: COLOURS[index % COLOURS.length] }) : null,
      several ? `${curve.name} ` : null,
      element("b", {}, course(curve)),
    ),
  );
  return element(
    "figure",
    { class: "panel" },
    element(
      "figcaption",
      {},
      element("strong", {}, panel.title),
      element("span", {}, panel.explanation),
      element("div", {}, ...keys),
    ),
    chart(panel, x),
  );
}

function course({ y }) {
  return y.length === 1 ? number(y[0]) : `${number(y[0])} → ${number(y.at(-1))}`;
}

function chart({ curves, reference }, xLabel) {
  const xs = curves.flatMap((curve) => curve.x);
  const ys = [...curves.flatMap((curve) => curve.y), ...(reference === null ? [] : [reference])];
  const [xLow, xHigh] = someWidth(Math.min(...xs), Math.max(...xs));
  const yTicks = ticks(Math.min(...ys), Math.max(...ys), 4);
  const [yLow, yHigh] = [yTicks[0], yTicks.at(-1)];
  const labels = tickLabels(yTicks);
  const left = 10 + CHARACTER * Math.max(...labels.map((label) => label.length));
  const across = (x) => left + ((x - xLow) / (xHigh - xLow)) * (WIDTH - RIGHT - left);
  const up = (y) => HEIGHT - BOTTOM - ((y - yLow) / (yHigh - yLow)) * (HEIGHT - BOTTOM - TOP);
  const parts = yTicks.flatMap((value, index) => [
    drawn("line", { class: "grid", x1: left, x2: WIDTH - RIGHT, y1: up(value), y2: up(value) }),
    drawn("text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" }, labels[index]),
  ]);
  const inside = ticks(xLow, xHigh, 5).filter((value) => value >= xLow && value <= xHigh);
  tickLabels(inside).forEach((label, index) => {
    parts.push(drawn("text", { x: across(inside[index]), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, label));
  });
  const middle = (left + WIDTH - RIGHT) / 2;
  parts.push(drawn("text", { class: "axis", x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, xLabel));
  if (reference !== null) {
    const level = { x1: left, x2: WIDTH - RIGHT, y1: up(reference), y2: up(reference) };
    parts.push(drawn("line", { class: "reference", ...level }));
  }
  curves.forEach((curve, index) => parts.push(...line(curve, COLOURS[index % COLOURS.length], xLabel, across, up)));
  const names = curves.map((curve) => `${curve.name} ${course(curve)}`).join(", ");
  return drawn(
    "svg",
    { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${names}, by ${xLabel}` },
    ...parts,
  );
}

function line({ name, x, y }, colour, xLabel, across, up) {
  const points = x.map((value, index) => [across(value), up(y[index])]);
  const path = `M${points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}`;
  const parts = [drawn("path", { class: `curve ${colour}`, d: path })];
  if (points.length === 1) {
    parts.push(drawn("circle", { class: `mark ${colour}`, cx: points[0][0], cy: points[0][1], r: 3 }));
  }
  const every = Math.max(1, Math.ceil(points.length / HOVER_POINTS));
  points.forEach(([a, b], index) => {
    if (index % every) return;
    const title = drawn("title", {}, `${xLabel} ${number(x[index])}: ${name} ${number(y[index])}`);
    parts.push(drawn("circle", { class: `hit ${colour}`, cx: a, cy: b, r: 5 }, title));
  });
  return parts;
}

/** About `about` round values that cover [low, high]: the first is at most `low`, the last at least `high`. */
export function ticks(low, high, about) {
  [low, high] = someWidth(low, high);
  const rough = (high - low) / Math.max(1, about);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((value) => value >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** The values written with as many places as their distance needs. */
export function tickLabels(values) {
  const largest = Math.max(0, ...values.map(Math.abs));
  if (largest && (largest >= 1e5 || largest < 1e-3)) {
    const written = (places) => values.map((value) => (value === 0 ? "0" : scientific(value, places)));
    return new Set(written(1)).size < values.length ? written(3) : written(1);
  }
  const step = values.length > 1 ? Math.min(...values.slice(1).map((value, index) => value - values[index])) : 1;
  let places = Math.max(0, Math.min(6, 1 - Math.floor(Math.log10(step) + 1e-9)));
  while (places > 0 && values.every((value) => value.toFixed(places).endsWith("0"))) places -= 1;
  return values.map((value) => (Number(value.toFixed(places)) === 0 ? "0" : figure(value, places)));
}

/** A figure for a person: four significant digits, or powers of ten where it is tiny or huge. */
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return scientific(value, 1);
  const places = Math.max(0, 3 - Math.floor(Math.log10(size)));
  return figure(Number(value.toFixed(places)), places).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

function scientific(value, places) {
  const [mantissa, exponent] = value.toExponential(places).split("e");
  const raised = (digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)];
  const power = [...String(Number(exponent))].map(raised).join("");
  return `${mantissa.replace(/\.?0+$/, "").replace("-", "−")}·10${power}`;
}

function someWidth(low, high) {
  if (high - low > 1e-12 * Math.max(1e-12, Math.abs(low), Math.abs(high))) return [low, high];
  const half = Math.abs(low) * 0.1;
  return half ? [low - half, high + half] : [0, 1];
}
