// The box at the bottom: a document, a question, the answer as it is made, and which parts of the document were read.

import { count, example, levelOf, markedPieces, percent, readPassages, RESIDENT } from "./logic.js";
import { drawBlocks } from "./draw.js";
import { answer, models, passages, Refusal } from "./server.js";

const MOST_SHOWN = 6;

export function openAsking({ at, showNotice, showRefusal, setOwn, watchCells, colourOf }) {
  let stopping = null, read = null, cursor = -1, layout = null;

  function content() {
    const text = at("doc").value.trim();
    return text ? `${text}\n\n${at("question").value.trim()}` : at("question").value.trim();
  }

  function bodyOf(model) {
    return {
      model,
      messages: [{ role: "user", content: content() }],
      max_tokens: Number(at("max-tokens").value),
      temperature: 0,
      forepage: { mode: at("mode").value, budget_blocks: Number(at("budget").value), reads: true },
    };
  }

  async function ask() {
    stopping = new AbortController();
    setBusy(true);
    showNotice("", null, "");
    read = null;
    at("read-panel").hidden = true;
    at("answer-box").hidden = false;
    at("answer").textContent = "";
    at("facts").replaceChildren();
    try {
      const served = await models();
      if (!served.length) throw new Refusal({ status: 503, code: "dependency_unavailable", message: "no decode worker can be reached; start one with forepage worker.", retryAfter: 2 });
      const body = bodyOf(served[0].id), started = performance.now();
      const usage = await say(body, stopping.signal);
      if (!usage) return;
      showFacts(usage, performance.now() - started);
      await showRead(body, usage.forepage, stopping.signal);
    } catch (error) {
      if (error.name === "AbortError") showNotice("warn", "Stopped.", "The worker has freed what the question held.");
      else if (error instanceof Refusal) showRefusal(error);
      else throw error;
    } finally {
      setBusy(false);
      if (!at("answer").textContent) at("answer-box").hidden = true;
    }
  }

  async function say(body, signal) {
    let usage = null;
    for await (const chunk of answer(body, signal)) {
      setOwn(chunk.id.replace(/^chatcmpl-/, ""));
      at("answer").append(chunk.choices[0]?.delta?.content ?? "");
      usage = chunk.usage ?? usage;
    }
    if (!at("answer").textContent) at("answer").textContent = "(The model said nothing.)";
    return usage;
  }

  function showFacts(usage, elapsed) {
    const report = usage.forepage, facts = [
      ["prompt tokens", count(usage.prompt_tokens)],
      ["of them cached", count(usage.prompt_tokens_details.cached_tokens)],
      ["said", count(usage.completion_tokens)],
      ["seconds", (elapsed / 1000).toFixed(1)],
    ];
    if (report) {
      facts.push(["mode at the end", report.full_by_size ? "full: it fitted" : report.full_by_room && !report.paged_steps && !report.exact_steps ? "full: there was room" : report.mode_final], ["evidence recall", report.evidence_recall_mean === null ? "no audit yet" : percent(report.evidence_recall_mean)],
        ["audited steps", count(report.audited_steps)], ["KV footprint", percent(report.kv_footprint)], ["most blocks resident", count(report.resident_blocks_max)], ["late plans", count(report.late_plans)]);
    }
    at("facts").replaceChildren(...facts.map(([name, value]) => {
      const box = document.createElement("div"), term = document.createElement("dt"), said = document.createElement("dd");
      term.textContent = name;
      said.textContent = value;
      box.append(term, said);
      return box;
    }));
  }

  async function showRead(body, report, signal) {
    if (!report) return;
    const text = body.messages[0].content;
    const where = await passages({ model: body.model, messages: body.messages }, signal);
    const found = readPassages(text, where.blocks, report.read_block_idx, report.read_mass);
    read = { text, where, found, report };
    cursor = -1;
    at("read-panel").hidden = false;
    at("whole").setAttribute("aria-expanded", "false");
    at("document").hidden = true;
    const total = where.blocks.length;
    at("read-summary").textContent = found.length
      ? `${found.length} of ${total} blocks held evidence`
      : `no block stood out: attention was spread over all ${total} blocks`;
    at("passages").replaceChildren(...found.slice(0, MOST_SHOWN).map(passageItem));
    redraw();
  }

  function passageItem(passage) {
    const item = document.createElement("li"), title = document.createElement("b"), words = document.createElement("p");
    const isLast = passage.end >= read.text.length;
    title.textContent = `Block ${passage.block} · ${percent(passage.share)} of what was read${isLast ? " · your question is in it" : ""}`;
    words.textContent = `${passage.start ? "… " : ""}${passage.text.trim()}${isLast ? "" : " …"}`;
    words.tabIndex = 0;
    item.append(title, words);
    return item;
  }

  function showWhole() {
    const isOpen = at("document").hidden;
    at("document").hidden = !isOpen;
    at("whole").setAttribute("aria-expanded", String(isOpen));
    at("whole").textContent = isOpen ? "Hide the whole document" : "Show the whole document";
    if (!isOpen || !read) return;
    at("document").replaceChildren(...markedPieces(read.text, read.found).map((piece) => {
      if (!piece.level) return document.createTextNode(piece.text);
      const mark = document.createElement("mark");
      mark.className = `l${piece.level}`;
      mark.title = `block ${piece.block}`;
      mark.textContent = piece.text;
      return mark;
    }));
    at("document").querySelector("mark.l3")?.scrollIntoView({ block: "nearest" });
  }

  /** The blocks of the prompt: read ones are full, those read most are outlined. */
  function redraw() {
    if (!read || at("read-panel").hidden) return;
    const states = new Uint8Array(read.where.blocks.length), most = Math.max(0, ...read.found.map((one) => one.share));
    for (const passage of read.found) states[passage.block] = RESIDENT;
    const outlined = new Set(read.found.filter((one) => levelOf(one.share, most) === 3).map((one) => one.block));
    layout = drawBlocks(at("read-map"), { states, pinnedFrom: Infinity, outlined, cursor }, colourOf());
    at("read-map").setAttribute("aria-label", `${read.found.length} of ${states.length} blocks were read. Arrow keys go from block to block.`);
    const passage = read.found.find((one) => one.block === cursor);
    at("read-block").textContent = cursor < 0 ? "Full squares were read; outlined ones most." : passage
      ? `Block ${cursor}: ${percent(passage.share)} of what was read. “${passage.text.slice(0, 90).trim()}…”` : `Block ${cursor}: not read`;
  }

  function setBusy(isBusy) {
    at("send").disabled = isBusy;
    at("stop").hidden = !isBusy;
    at("send").textContent = isBusy ? "Asking…" : "Ask";
    if (!isBusy) stopping = null;
  }

  function showSize() {
    const length = at("doc").value.length;
    at("doc-size").textContent = length ? `${count(length)} characters` : "";
  }

  at("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!stopping) ask();
  });
  at("stop").addEventListener("click", () => stopping?.abort());
  at("doc").addEventListener("input", showSize);
  at("example").addEventListener("click", () => {
    const { document: text, question } = example();
    at("doc").value = text;
    at("question").value = question;
    showSize();
  });
  at("file").addEventListener("change", async () => {
    const [file] = at("file").files;
    if (file) at("doc").value = await file.text();
    showSize();
  });
  at("whole").addEventListener("click", showWhole);
  watchCells(at("read-map"), { layoutOf: () => layout, lengthOf: () => read?.where.blocks.length ?? 0, cursorOf: () => cursor, setCursor: (idx) => { cursor = idx; redraw(); } });
  return { redraw };
}
