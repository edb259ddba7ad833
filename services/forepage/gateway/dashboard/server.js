// Talks to the gateway: the feed of snapshots, answers as they are made, and where blocks lie in the text.
// An API key, where one is needed, is kept for this tab only.

import { EventReader } from "./logic.js";

const KEY = "forepage-key";

export function hasKey() { return sessionStorage.getItem(KEY) !== null; }

export function keepKey(key) { sessionStorage.setItem(KEY, key); }

/** What the server refused, or could not be asked; `status` 0: nobody answered. */
export class Refusal extends Error {
  constructor({ status, code, message, retryAfter }) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function open(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ status: 0, code: "", message: String(error.message) });
  }
  if (!reply.ok) throw await refusalOf(reply);
  return reply;
}

async function refusalOf(reply) {
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch { /* a proxy's page, not ours */ }
  return new Refusal({ status: reply.status, code: error.code ?? "", message: error.message ?? reply.statusText, retryAfter: reply.headers.get("retry-after") });
}

async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader(), events = new EventReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* events.feed(value);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal({ status: 0, code: "", message: String(error.message) });
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Snapshots, for as long as the connection holds. */
export async function* snapshots(signal) {
  for await (const data of eventsOf(await open("/dashboard/feed", { signal }))) yield JSON.parse(data);
}

export async function models() { return (await (await open("/v1/models")).json()).data; }

function post(path, body, signal) {
  return open(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
}

export async function passages(body, signal) { return (await post("/dashboard/passages", body, signal)).json(); }

/** Chunks of an answer. Throws a Refusal for an error in mid-stream, and for a stream that ends without an end. */
export async function* answer(body, signal) {
  const reply = await post("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of eventsOf(reply)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal({ status: 500, ...chunk.error });
    yield chunk;
  }
  throw new Refusal({ status: 0, code: "", message: "the answer broke off" });
}
