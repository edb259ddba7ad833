// Draws blocks and curves on canvases, in the colours of the style sheet. States differ in shape too: a ring (where
// there are many, a point) is cold, a full square resident, one with a dot just prefetched, a cross missed, a half-full one loading.

import { COLD, LOADING, PREFETCHED, RESIDENT, layoutCells } from "./logic.js";

const NAMES = ["cold", "resident", "prefetched", "missed", "read", "panel", "muted", "line", "accent", "text"];

export function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Size the canvas for the screen's pixels; its context draws in CSS pixels. */
function prepared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Draw a map of blocks; `outlined` get a ring, blocks from `pinnedFrom` on a line beneath. Answers its layout. */
export function drawBlocks(canvas, { states, pinnedFrom, outlined, cursor }, colour) {
  const layout = layoutCells(states.length, canvas.clientWidth - 4);
  const context = prepared(canvas, canvas.clientWidth, layout.rows * layout.step + 6);
  for (let idx = 0; idx < states.length; idx++) {
    const x = 2 + (idx % layout.columns) * layout.step, y = 2 + Math.floor(idx / layout.columns) * layout.step;
    drawCell(context, x, y, layout.side, states[idx], colour);
    if (idx >= pinnedFrom && layout.side >= 11) {
      context.fillStyle = colour.resident;
      context.fillRect(x, y + layout.side + 1, layout.side, 1.5);
    }
    if (outlined.has(idx)) frame(context, x - 0.5, y - 0.5, layout.side + 1, 2, colour.read);
    if (idx === cursor) frame(context, x - 1.5, y - 1.5, layout.side + 3, 1.5, colour.text);
  }
  return layout;
}

function drawCell(context, x, y, side, state, colour) {
  const isSmall = side < 11;
  if (state === COLD && isSmall) {
    context.fillStyle = colour.cold;
    context.fillRect(x + side / 2 - 1, y + side / 2 - 1, 2, 2);
    return undefined;
  }
  if (state === COLD) return frame(context, x, y, side, 1, colour.cold);
  if (state === RESIDENT || state === PREFETCHED) {
    context.fillStyle = state === RESIDENT ? colour.resident : colour.prefetched;
    context.fillRect(x, y, side, side);
    if (state === PREFETCHED) {
      context.fillStyle = colour.panel;
      context.beginPath();
      context.arc(x + side / 2, y + side / 2, Math.max(1, side / 6), 0, 2 * Math.PI);
      context.fill();
    }
    return undefined;
  }
  if (state === LOADING) {
    frame(context, x, y, side, 1, colour.prefetched);
    context.fillStyle = colour.prefetched;
    context.fillRect(x, y + side / 2, side, side / 2);
    return undefined;
  }
  frame(context, x, y, side, isSmall ? 1 : 2, colour.missed);
  context.strokeStyle = colour.missed;
  context.lineWidth = isSmall ? 1 : 2;
  context.beginPath();
  context.moveTo(x + 1, y + 1);
  context.lineTo(x + side - 1, y + side - 1);
  context.moveTo(x + side - 1, y + 1);
  context.lineTo(x + 1, y + side - 1);
  context.stroke();
  return undefined;
}

function frame(context, x, y, side, width, colour) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.strokeRect(x + width / 2, y + width / 2, side - width, side - width);
}

/** Curves over the last five minutes up to `now`. `top` null: as high as the values; `floor`: a dashed line. */
export function drawChart(canvas, runs, { now, span, top, floor }, colour) {
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const context = prepared(canvas, width, height);
  const values = runs.flat().map((point) => point.value);
  const high = top ?? Math.max(1, ...values) * 1.15;
  const xOf = (time) => width - 3 - ((now - time) / span) * (width - 6);
  const yOf = (value) => height - 4 - (Math.min(value, high) / high) * (height - 8);
  context.strokeStyle = colour.line;
  context.lineWidth = 1;
  context.strokeRect(0.5, 0.5, width - 1, height - 1);
  if (floor !== undefined) {
    context.setLineDash([3, 4]);
    context.strokeStyle = colour.muted;
    context.beginPath();
    context.moveTo(1, yOf(floor));
    context.lineTo(width - 1, yOf(floor));
    context.stroke();
    context.setLineDash([]);
  }
  context.strokeStyle = context.fillStyle = colour.accent;
  context.lineWidth = 1.75;
  for (const run of runs) {
    context.beginPath();
    run.forEach((point, at) => (at ? context.lineTo : context.moveTo).call(context, xOf(point.time), yOf(point.value)));
    context.stroke();
    const last = run[run.length - 1];
    context.beginPath();
    context.arc(xOf(last.time), yOf(last.value), 2.5, 0, 2 * Math.PI);
    context.fill();
  }
}
