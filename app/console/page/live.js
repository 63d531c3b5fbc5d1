// The live data: one connection, opened again with growing pauses whenever it ends.

import { errorOf, events, showing } from "./events.js";

const SILENCE_MS = 6000;
const PAUSE_MS = [500, 1000, 2000, 4000, 8000, 15000];

/**
 * Watch until told otherwise. `told.snapshot(data)` is called for each snapshot, `told.lost(pauseMs, why)` when the
 * connection is gone and will be tried again after so long, `told.refused({status, code, message})` when the key opens
 * nothing here: then it is over. Returns a function that ends it.
 */
export function watch(key, told) {
  const end = new AbortController();
  follow(key, told, end.signal);
  return () => end.abort();
}

async function follow(key, told, ended) {
  for (let failures = 0; !ended.aborted; ) {
    let why = "The connection ended.";
    try {
      const refusal = await once(key, ended, (data) => {
        failures = 0;
        told.snapshot(data);
      });
      if (ended.aborted) return;
      if (refusal && [401, 403, 429].includes(refusal.status)) return told.refused(refusal);
      if (refusal) why = refusal.message;
    } catch {
      why = "The gateway cannot be reached.";
    }
    if (ended.aborted) return;
    const pause = PAUSE_MS[Math.min(failures++, PAUSE_MS.length - 1)] * (0.75 + Math.random() / 2);
    told.lost(pause, why);
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

/** One connection, until it ends or falls silent. What it was refused with, if it was. */
async function once(key, ended, onSnapshot) {
  const given = new AbortController();
  const give = () => given.abort();
  ended.addEventListener("abort", give);
  let silence = setTimeout(give, SILENCE_MS);
  try {
    const response = await fetch("admin/live", { headers: showing(key), signal: given.signal, cache: "no-store" });
    if (!response.ok) return { status: response.status, ...(await errorOf(response)) };
    for await (const { event, data } of events(response.body)) {
      clearTimeout(silence);
      silence = setTimeout(give, SILENCE_MS);
      if (event === "snapshot") onSnapshot(JSON.parse(data));
    }
    return null;
  } finally {
    clearTimeout(silence);
    ended.removeEventListener("abort", give);
  }
}
