// The page: what the feed says goes to the map, the list and the curves; asking is in ask.js.

import { addPoint, adviceFor, blockLine, blockStates, bitsOf, cellAt, count, counted, figuresOf, milliseconds, moveCursor,
  percent, runsOf, sequencesOf, SERIES_MS, summaryOf } from "./logic.js";
import { colours, drawBlocks, drawChart } from "./draw.js";
import { hasKey, keepKey, Refusal, snapshots } from "./server.js";
import { openAsking } from "./ask.js";

const RETRY_MS = 2000;
const FLOOR = 0.95;
const at = (id) => document.getElementById(id);

let colour = colours();
let frame = null;
let isFollowing = false;
let chosen = null; // request id of the sequence that the map shows, once somebody chose
let own = null; // request id of this page's question
let kept = null; // the last state of a sequence that has ended: the map does not go blank with it
let cursor = -1;
let layout = null;
const series = { recall: [], latency: [], footprint: [] };

/** Show a notice: what went wrong, and what to do about it. */
function showNotice(kind, title, advice) {
  const box = at("notice");
  box.hidden = title === null;
  if (title === null) return;
  box.dataset.kind = kind;
  const strong = document.createElement("strong");
  strong.textContent = title;
  box.replaceChildren(strong, advice);
}

function showRefusal(refusal) {
  const { title, advice, needsKey } = adviceFor({ ...refusal, message: refusal.message, hadKey: hasKey() });
  if (needsKey) openKey(true, { words: advice, isWrong: hasKey() });
  else showNotice("bad", title, advice);
}

function setOwn(requestId) {
  own = requestId;
  chosen = requestId ?? chosen;
  render();
}

function setStatus(kind, text) {
  at("status").dataset.kind = kind;
  if (at("status").textContent !== text) at("status").textContent = text;
}

function shown() {
  const running = frame ? sequencesOf(frame) : [];
  return running.find((one) => one.request_id === chosen) ?? (kept?.request_id === chosen ? null : running[0]) ?? null;
}

function render() {
  if (!frame) return;
  const running = sequencesOf(frame), sequence = shown();
  if (sequence) {
    if (kept?.request_id !== sequence.request_id) cursor = -1;
    kept = sequence;
  }
  if (isFollowing) renderWorkers();
  renderMap(sequence ?? kept, sequence === null);
  renderList(running, (sequence ?? kept)?.request_id);
}

function renderWorkers() {
  const live = frame.workers.filter((worker) => worker.lost === null), lost = frame.workers.filter((worker) => worker.lost !== null);
  if (!frame.workers.length && frame.num_listed) {
    setStatus("wait", "waiting for the worker");
    return;
  }
  if (!live.length) {
    setStatus("bad", lost.length ? "no worker answers" : "no worker");
    at("load").textContent = lost.map((worker) => worker.worker_id).join(", ");
    showEmpty("No decode worker answers.", "forepage up starts a dead one again within seconds; alone it is started with forepage worker. Its log says why it ended.");
    return;
  }
  showEmpty("Nothing is running.", null);
  const draining = live.every((worker) => worker.draining);
  setStatus(lost.length || draining ? "wait" : "live", lost.length ? `live, ${lost.length} of ${frame.workers.length} workers lost` : draining ? "draining" : "live");
  const sum = (name) => live.reduce((total, worker) => total + worker[name], 0);
  const used = 1 - sum("row_blocks_free") / Math.max(1, sum("row_blocks_total"));
  const names = [...new Set(live.map((worker) => worker.model_name))].join(", ");
  at("load").textContent = `${names} · ${sum("running")} running, ${sum("waiting")} waiting · ${percent(used)} of ${count(sum("row_blocks_total"))} device blocks held`;
}

/** What the map says without blocks; with no text of its own it teaches. */
function showEmpty(title, text) {
  at("map-empty-title").textContent = title;
  at("map-empty-text").textContent = text ?? "";
  at("map-empty-text").hidden = text === null;
  at("map-lesson").hidden = text !== null;
}

function renderMap(sequence, isOver) {
  const hasBlocks = Boolean(sequence?.num_blocks);
  at("map-empty").hidden = hasBlocks || Boolean(sequence);
  at("map").hidden = !hasBlocks;
  if (!sequence) {
    at("map-summary").textContent = "";
    at("map-block").textContent = "";
    return;
  }
  const states = blockStates(sequence);
  const who = sequence.request_id === own ? "your question" : sequence.request_id.slice(0, 8);
  at("map-summary").textContent = `${who}${!isOver ? "" : isFollowing ? " (ended)" : " (last seen)"}: ${summaryOf(sequence, states)}`;
  if (!hasBlocks) {
    at("map-block").textContent = "Waiting for room on the device.";
    return;
  }
  layout = drawBlocks(at("map"), { states, pinnedFrom: pinnedFrom(sequence), outlined: new Set(sequence.read_block_idx), cursor }, colour);
  at("map").setAttribute("aria-label", `Blocks of ${who}: ${summaryOf(sequence, states)}. Arrow keys go from block to block.`);
  const line = cursor >= 0 && cursor < states.length ? blockLine(sequence, states, cursor, frame.block_tokens) : progressOf(sequence);
  if (at("map-block").textContent !== line) at("map-block").textContent = line;
}

/** A prompt that is being read is all on the device, for a while. */
function pinnedFrom(sequence) { return ["decode", "paused"].includes(sequence.phase) ? sequence.pinned_from : Infinity; }

function progressOf(sequence) {
  if (sequence.phase === "prefill") return `Reading the prompt: ${count(sequence.processed_tokens)} of ${count(sequence.prompt_tokens)} tokens.`;
  const late = sequence.late_plans ? ` · ${counted(sequence.late_plans, "late plan")}` : "";
  const raised = sequence.escalations ? ` · ${counted(sequence.escalations, "escalation")}` : "";
  return `Interval ${sequence.interval} · budget ${sequence.budget_blocks} blocks · newest plan ${milliseconds(sequence.prefetch_latency_ms)}${late}${raised}`;
}

function renderList(running, current) {
  at("list-empty").hidden = running.length > 0;
  at("list-scroll").hidden = running.length === 0;
  at("list-count").textContent = running.length ? String(running.length) : "";
  const focused = document.activeElement?.dataset?.sequence;
  at("list").replaceChildren(...running.map((one) => rowOf(one, one.request_id === current)));
  if (focused) at("list").querySelector(`[data-sequence="${CSS.escape(focused)}"]`)?.focus();
}

function rowOf(sequence, isCurrent) {
  const row = document.createElement("tr");
  if (isCurrent) row.setAttribute("aria-current", "true");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.sequence = sequence.request_id;
  button.textContent = sequence.request_id.slice(0, 8);
  button.title = `${sequence.request_id} on ${sequence.worker_id}`;
  const first = row.insertCell();
  first.append(button);
  if (sequence.request_id === own) first.append(tag("yours"));
  const held = bitsOf(sequence.resident, sequence.num_blocks).reduce((sum, bit) => sum + bit, 0);
  cell(row, sequence.phase.replace("_", " "));
  cell(row, sequence.mode);
  cell(row, count(sequence.prompt_tokens), "num");
  cell(row, count(sequence.generated_tokens), "num");
  cell(row, sequence.num_blocks ? `${held}/${sequence.num_blocks}` : "–", "num");
  const isLow = sequence.evidence_recall !== null && sequence.evidence_recall < FLOOR;
  cell(row, percent(sequence.evidence_recall), isLow ? "num low" : "num");
  return row;
}

function cell(row, text, className = "") {
  const made = row.insertCell();
  made.textContent = text;
  made.className = className;
}

function tag(text) {
  const made = document.createElement("span");
  made.className = "tag";
  made.textContent = text;
  return made;
}

/** With each frame, and each second between: what is measured now. A lost feed measures nothing. */
function note() {
  const figures = isFollowing ? figuresOf(sequencesOf(frame)) : { recall: null, latency: null, footprint: null };
  for (const name of Object.keys(series)) addPoint(series[name], Date.now(), figures[name]);
  drawCharts();
}

function drawCharts() {
  const now = Date.now();
  const words = { recall: (value) => percent(value), latency: milliseconds, footprint: (value) => percent(value) };
  const how = { recall: { top: 1.02, floor: FLOOR }, latency: { top: null }, footprint: { top: 1.02 } };
  for (const [name, points] of Object.entries(series)) {
    const newest = points.length ? points[points.length - 1].value : null;
    at(`${name}-now`).textContent = words[name](newest);
    const said = points.filter((point) => point.value !== null).map((point) => point.value);
    const range = said.length ? `between ${words[name](Math.min(...said))} and ${words[name](Math.max(...said))}` : "nothing measured yet";
    at(name).setAttribute("aria-label", `Last five minutes: ${range}`);
    drawChart(at(name), runsOf(points), { now, span: SERIES_MS, ...how[name] }, colour);
  }
}

/** Follow the feed while the page can be seen; a page in the background lets its connection go. */
async function follow() {
  for (;;) {
    await visible();
    const away = new AbortController();
    const leave = () => { if (document.hidden) away.abort(); };
    let isRekeyed = false, isRefused = false;
    reconnect = () => { isRekeyed = true; away.abort(); wake(); };
    document.addEventListener("visibilitychange", leave);
    try {
      for await (const one of snapshots(away.signal)) {
        frame = one;
        isFollowing = true;
        note();
        if (at("notice").dataset.of === "feed") hideFeedNotice();
        render();
      }
      setStatus("wait", "the gateway ended the feed");
    } catch (error) {
      if (error.name !== "AbortError") lose(error);
      isRefused = error.status === 401;
    } finally {
      isFollowing = false;
      document.removeEventListener("visibilitychange", leave);
    }
    if (!document.hidden && !isRekeyed) await pause(isRefused);
  }
}

/** Until it is worth trying again: a while, or until there is another key. */
function pause(isRefused) {
  return new Promise((resolve) => {
    wake = resolve;
    if (!isRefused) setTimeout(resolve, RETRY_MS);
  });
}

let wake = () => {};
let reconnect = () => {};

/** Nothing is known of now: no sequence is listed as running, the map stays as it was last seen. */
function lookBack() {
  isFollowing = false;
  if (frame) frame = { ...frame, workers: [] };
  render();
}

function lose(error) {
  if (!(error instanceof Refusal)) throw error;
  lookBack();
  const needsKey = error.status === 401;
  setStatus("bad", needsKey ? (hasKey() ? "key refused" : "key needed") : error.status === 0 ? "gateway lost" : "feed refused");
  showEmpty("Not connected.", `What is resident is shown as soon as ${needsKey ? "the server knows your key" : "the gateway answers"}.`);
  at("load").textContent = "";
  showRefusal(error);
  at("notice").dataset.of = "feed";
}

function hideFeedNotice() {
  delete at("notice").dataset.of;
  showNotice("", null, "");
}

function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function shownAgain() {
      document.removeEventListener("visibilitychange", shownAgain);
      resolve();
    });
  });
}

function openKey(isOpen, { words = "The API key of this server. It stays in this tab.", isWrong = false } = {}) {
  at("key-form").hidden = !isOpen;
  at("key-form").dataset.kind = isWrong ? "bad" : "";
  at("key").setAttribute("aria-invalid", String(isWrong));
  at("key-form").querySelector("label").textContent = words;
  at("key-open").setAttribute("aria-expanded", String(isOpen));
  if (isOpen && document.activeElement === document.body) at("key").focus();
}

/** Pointer and arrow keys over a map of blocks; `setCursor` shows the block. */
function watchCells(canvas, { layoutOf, lengthOf, cursorOf, setCursor }) {
  canvas.addEventListener("pointermove", (event) => {
    const idx = layoutOf() ? cellAt(layoutOf(), event.offsetX - 2, event.offsetY - 2, lengthOf()) : -1;
    if (idx >= 0) setCursor(idx);
  });
  canvas.addEventListener("pointerleave", () => { if (document.activeElement !== canvas) setCursor(-1); });
  canvas.addEventListener("blur", () => setCursor(-1));
  canvas.addEventListener("keydown", (event) => {
    const next = layoutOf() ? moveCursor(event.key, Math.max(0, cursorOf()), layoutOf().columns, lengthOf()) : null;
    if (next === null) return;
    event.preventDefault();
    setCursor(next);
  });
  canvas.addEventListener("focus", () => { if (cursorOf() < 0) setCursor(0); });
}

at("list").addEventListener("click", (event) => {
  const id = event.target.closest("button")?.dataset.sequence;
  if (id) { chosen = id; render(); }
});
at("key-open").addEventListener("click", () => openKey(at("key-form").hidden));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(at("key").value.trim());
  at("key").value = "";
  openKey(false);
  showNotice("", null, "");
  setStatus("wait", "connecting");
  reconnect();
});
watchCells(at("map"), { layoutOf: () => layout, lengthOf: () => kept?.num_blocks ?? 0, cursorOf: () => cursor, setCursor: (idx) => { cursor = idx; render(); } });
const asking = openAsking({ at, showNotice, showRefusal, setOwn, watchCells, colourOf: () => colour });
const redraw = () => { colour = colours(); render(); drawCharts(); asking.redraw(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
setInterval(() => { if (!document.hidden) note(); }, 1000);
note();
follow();
