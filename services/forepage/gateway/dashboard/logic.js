// What the page works out, without a document: tested by itself. Offsets of text are UTF-16 units.

export const COLD = 0, RESIDENT = 1, PREFETCHED = 2, MISSED = 3, LOADING = 4;
export const STATE_WORDS = ["cold", "resident", "just prefetched", "missed", "loading"];
export const SERIES_MS = 300_000;

const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/** A bit a block, the lowest first, from base64: an array of 0 and 1. */
export function bitsOf(base64, count) {
  const bits = new Uint8Array(count);
  let held = 0, width = 0, at = 0;
  for (const letter of base64) {
    const value = BASE64.indexOf(letter);
    if (value < 0) break;
    held = (held << 6) | value;
    width += 6;
    if (width < 8) continue;
    width -= 8;
    const byte = (held >> width) & 255;
    for (let bit = 0; bit < 8 && at < count; bit++, at++) bits[at] = (byte >> bit) & 1;
  }
  return bits;
}

/** The state of every block of a sequence. A missed block that has come since counts as what it is now. */
export function blockStates(sequence) {
  const states = bitsOf(sequence.resident, sequence.num_blocks);
  for (const idx of sequence.loading_block_idx) if (!states[idx]) states[idx] = LOADING;
  for (const idx of sequence.missed_block_idx) if (!states[idx]) states[idx] = MISSED;
  for (const idx of sequence.prefetched_block_idx) if (states[idx] === RESIDENT) states[idx] = PREFETCHED;
  return states;
}

export function countStates(states) {
  const counts = STATE_WORDS.map(() => 0);
  for (const state of states) counts[state]++;
  return counts;
}

export function summaryOf(sequence, states) {
  if (!sequence.num_blocks) return "holds nothing yet";
  const counts = countStates(states);
  const held = counts[RESIDENT] + counts[PREFETCHED];
  const parts = [`${held} of ${sequence.num_blocks} blocks resident`];
  for (const state of [PREFETCHED, LOADING, MISSED]) if (counts[state]) parts.push(`${counts[state]} ${STATE_WORDS[state]}`);
  return parts.join(", ");
}

export function blockLine(sequence, states, idx, blockTokens) {
  const first = idx * blockTokens;
  const parts = [STATE_WORDS[states[idx]]];
  if (sequence.num_blocks && idx >= sequence.pinned_from) parts.push("always resident");
  if (sequence.read_block_idx.includes(idx)) parts.push("read at the newest step");
  return `Block ${idx}, tokens ${first} to ${first + blockTokens - 1}: ${parts.join(", ")}`;
}

/** Square cells that fill a width: their side, the step to the next, columns and rows. */
export function layoutCells(count, width) {
  const side = count <= 96 ? 20 : count <= 400 ? 15 : count <= 1200 ? 11 : count <= 2500 ? 8 : 6;
  const gap = side >= 15 ? 4 : side >= 11 ? 3 : 2;
  const step = side + gap;
  const columns = Math.max(1, Math.floor((width + gap) / step));
  return { side, step, columns, rows: Math.ceil(count / columns) };
}

export function cellAt(layout, x, y, count) {
  const column = Math.floor(x / layout.step), row = Math.floor(y / layout.step);
  const idx = row * layout.columns + column;
  return column >= 0 && column < layout.columns && row >= 0 && idx < count ? idx : -1;
}

/** Where an arrow key leads from a cell; null for other keys. */
export function moveCursor(key, idx, columns, count) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  if (!(key in steps)) return null;
  return Math.min(count - 1, Math.max(0, idx + steps[key]));
}

/** Every running sequence of a frame, with the worker that runs it. */
export function sequencesOf(frame) {
  return frame.workers.flatMap((worker) => worker.sequences.map((one) => ({ ...one, worker_id: worker.worker_id })));
}

/** One value for each chart; null where no sequence has said any. */
export function figuresOf(sequences) {
  const said = (name) => sequences.map((one) => one[name]).filter((value) => value !== null);
  const recalls = said("evidence_recall"), latencies = said("prefetch_latency_ms"), shares = said("kv_footprint");
  return {
    recall: recalls.length ? Math.min(...recalls) : null,
    latency: latencies.length ? Math.max(...latencies) : null,
    footprint: shares.length ? shares.reduce((sum, value) => sum + value, 0) / shares.length : null,
  };
}

/** Adds a point and forgets those that are older than five minutes. */
export function addPoint(series, time, value) {
  series.push({ time, value });
  while (series.length && series[0].time < time - SERIES_MS) series.shift();
}

/** Runs of points that have a value; a silence longer than `gapMs` parts them too. */
export function runsOf(series, gapMs = 3000) {
  const runs = [];
  let run = null, last = -Infinity;
  for (const point of series) {
    if (point.value === null || point.time - last > gapMs) run = null;
    last = point.time;
    if (point.value === null) continue;
    if (!run) runs.push((run = []));
    run.push(point);
  }
  return runs;
}

/** Reads server-sent events from pieces of text cut anywhere; answers the data of those that are complete. */
export class EventReader {
  #rest = "";

  feed(text) {
    const events = (this.#rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.#rest = events.pop();
    return events
      .map((event) => event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).replace(/^ /, "")).join("\n"))
      .filter((data) => data !== "");
  }
}

/** Blocks that were read, by falling mass, with their part of the text; blocks outside the text are left out. */
export function readPassages(text, spans, blockIdx, mass) {
  const total = mass.reduce((sum, value) => sum + value, 0) || 1;
  return blockIdx
    .map((block, at) => ({ block, share: mass[at] / total, start: spans[block]?.[0] ?? 0, end: spans[block]?.[1] ?? 0 }))
    .filter((passage) => passage.end > passage.start)
    .map((passage) => ({ ...passage, text: text.slice(passage.start, passage.end) }))
    .sort((one, other) => other.share - one.share || one.block - other.block);
}

/** The text in order, cut where marks begin and end; level 0 is unmarked, 3 was read most. */
export function markedPieces(text, passages) {
  const most = Math.max(0, ...passages.map((passage) => passage.share));
  const pieces = [];
  let at = 0;
  for (const passage of [...passages].sort((one, other) => one.start - other.start)) {
    if (passage.start > at) pieces.push({ level: 0, text: text.slice(at, passage.start) });
    pieces.push({ level: levelOf(passage.share, most), text: passage.text, block: passage.block });
    at = passage.end;
  }
  if (at < text.length) pieces.push({ level: 0, text: text.slice(at) });
  return pieces;
}

export function levelOf(share, most) { return share >= most / 2 ? 3 : share >= most / 8 ? 2 : 1; }

export function percent(value, digits = 0) { return value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`; }

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10_000 ? `${(value / 1000).toFixed(0)} s` : value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function count(value) { return String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f"); }

export function counted(number, noun) { return `${count(number)} ${noun}${number === 1 ? "" : "s"}`; }

/** A message of the server as a sentence; when to try again is said apart. */
export function sentence(message) {
  const said = message.replace(/[;,]? (try|send it) again\.?$/, "").trim();
  return said ? `${said[0].toUpperCase()}${said.slice(1)}${/[.!?]$/.test(said) ? "" : "."}` : "";
}

/** What went wrong, and what to do about it. */
export function adviceFor({ status, code, message, retryAfter, hadKey }) {
  const later = retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment.", said = sentence(message);
  if (status === 401) {
    const advice = hadKey ? "The server does not know this API key. Enter another; it stays in this tab." : "This server asks for an API key. It stays in this tab.";
    return { title: "This server asks for an API key.", advice, needsKey: true };
  }
  if (status === 0) return { title: "The gateway does not answer.", advice: "Is forepage up still running? The page tries again by itself." };
  if (code === "context_length_exceeded") return { title: "The document is too long for this model.", advice: said };
  if (code === "dependency_unavailable" || status === 503) return { title: "No room, or a process is missing.", advice: `${said} ${later}` };
  if (status === 429) return { title: "Too much at once.", advice: `${said} ${later}` };
  if (status === 413) return { title: "The document is larger than this server takes.", advice: `${said} The limit is FOREPAGE_GATEWAY__MAX_BODY_BYTES.` };
  return { title: "The question was not answered.", advice: said || later };
}

/** Something to try: many facts of one kind in a long text, one of them asked for. */
export function example(numLines = 330) {
  const names = ["Maria", "Peter", "Nora", "Ivan", "Lucy", "Omar", "Greta", "Hugo", "Iris", "Jonas", "Karen", "Leo"];
  const filler = ["The road along the river is quiet in the morning.", "Rain fell on the hills for most of the day.",
    "A train passed the old station without stopping.", "The garden behind the house was full of light.",
    "Two boats lay at the pier and nobody was in sight.", "The shop on the corner opens late in winter."];
  const lines = [];
  for (let at = 0; at < numLines; at++) {
    const who = Math.floor((at * names.length) / numLines);
    const first = at === Math.floor((who * numLines) / names.length + numLines / (2 * names.length));
    lines.push(first ? `The locker code of ${names[who]} is ${1000 + ((who * 7919 + 4231) % 9000)}.` : filler[(at * 7 + Math.floor(at / 5)) % filler.length]);
  }
  return { document: lines.join(" "), question: "What is the locker code of Nora?" };
}
