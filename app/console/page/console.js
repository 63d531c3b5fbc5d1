// The page: who may see it, what it shows, and how old that is.

import * as asking from "./ask.js";
import { at, hide, rows, say, sparkline } from "./draw.js";
import { NONE, bytes, count, rate, share, span, words } from "./format.js";
import { watch } from "./live.js";

const KEY = "sluice.admin-key";
const STALE_MS = 3000;

const view = { end: () => {}, seen: null, retryAt: null, why: "" };

asking.open(() => sessionStorage.getItem(KEY));
at("door").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  connect();
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  view.end();
  ask("");
});
setInterval(tellAge, 1000);
connect();

function connect() {
  view.end();
  say(at("refused"), "");
  tellLink("connecting", "Connecting");
  view.end = watch(sessionStorage.getItem(KEY), {
    snapshot: show,
    lost: (pauseMs, why) => {
      view.retryAt = performance.now() + pauseMs;
      view.why = why;
      tellLink("lost", "Disconnected");
      tellAge();
    },
    refused: ({ status, message }) => {
      const had = sessionStorage.getItem(KEY);
      const wrong = status === 401 ? "This key opens nothing here. It may be mistyped, revoked or expired." : message;
      if (status !== 429) sessionStorage.removeItem(KEY);
      ask(had || status === 429 ? wrong : "");
    },
  });
}

/** Ask for the key, and show nothing until it is there. */
function ask(refused) {
  view.seen = null;
  hide(at("panels"), true);
  hide(at("forget"), true);
  hide(at("door"), false);
  say(at("facts"), "");
  say(at("age"), "");
  say(at("refused"), refused);
  tellLink("closed", "No key");
  document.title = "Sluice";
  at("key").value = "";
  at("key").focus();
}

function tellLink(state, text) {
  at("link").dataset.state = state;
  say(at("link"), text);
  document.body.classList.toggle("stale", state === "lost");
}

function tellAge() {
  if (view.seen === null || at("panels").hidden) {
    return say(at("age"), view.retryAt && at("door").hidden ? view.why : "");
  }
  const old = performance.now() - view.seen;
  if (at("link").dataset.state !== "lost" && old < STALE_MS) return say(at("age"), "");
  const again = view.retryAt ? Math.max(0, Math.ceil((view.retryAt - performance.now()) / 1000)) : 0;
  say(at("age"), words(`last seen ${Math.round(old / 1000)} s ago`, again ? `again in ${again} s` : ""));
}

function show(now) {
  view.seen = performance.now();
  view.retryAt = null;
  tellLink("live", "Live");
  if (at("panels").hidden) {
    const wasAsked = !at("door").hidden;
    hide(at("door"), true);
    hide(at("panels"), false);
    if (wasAsked) at("main").focus();
  }
  hide(at("forget"), !sessionStorage.getItem(KEY));
  tellAge();
  showFacts(now);
  showFigures(now);
  showWorkers(now);
  showQueue(now);
  showModels(now);
  showBatches(now);
  showRefusals(now);
  asking.offer(now.models.flatMap(({ name, variants }) => [name, ...variants.map((variant) => variant.public_name)]));
}

function showFacts(now) {
  const processes = now.processes === 1 ? "" : `${now.processes} processes`;
  say(at("facts"), words(`up ${span(now.at - now.started)}`, processes, `${count(now.in_flight)} in flight`));
  const notices = [];
  if (now.status === "draining") notices.push("This gateway is shutting down.");
  if (now.status === "not ready") notices.push("No worker is ready: requests are refused.");
  if (now.degraded) notices.push("Redis is out of reach: this process gives slots by itself, and sees its own queue only.");
  say(at("notice"), notices.join(" "));
  hide(at("notice"), notices.length === 0);
  document.title = now.status === "ready" ? "Sluice" : `Sluice: ${now.status}`;
}

function showFigures({ traffic, workers, queue }) {
  const { lately, paces } = traffic;
  const line = (name) => paces.map((pace) => pace && pace[name]);
  say(at("ttft"), span(lately.ttft_p50_s));
  say(at("ttft-tail"), lately.ttft_p95_s === null ? "no stream yet" : `median · p95 ${span(lately.ttft_p95_s)}`);
  const lines = [
    { values: line("ttft_p95_s"), className: "tail" },
    { values: line("ttft_p50_s"), className: "line" },
  ];
  sparkline(at("ttft-line"), lines, `Time to first token: median ${span(lately.ttft_p50_s)}, p95 ${span(lately.ttft_p95_s)}`);
  for (const [name, field] of [["tokens", "tokens_per_s"], ["requests", "requests_per_s"]]) {
    say(at(name), rate(lately[field]));
    const label = `${name} a second: ${rate(lately[field])}`;
    const peak = sparkline(at(`${name}-line`), [{ values: line(field), className: "line" }], label);
    say(at(`${name}-peak`), peak ? `peak ${rate(peak)}` : "");
  }
  const held = sum(workers, "slots_held");
  const most = sum(workers, "slots");
  say(at("slots"), count(held));
  say(at("slots-most"), `of ${count(most)}`);
  at("slots-bar").style.inlineSize = `${most ? Math.min(1, held / most) * 100 : 0}%`;
  say(at("waiting"), queue ? waitingOf(queue) : "The queue cannot be seen.");
}

function waitingOf({ flows }) {
  const waiting = sum(flows, "depth");
  const oldest = Math.max(0, ...flows.map((flow) => flow.oldest_s));
  return waiting ? `${count(waiting)} waiting, the oldest for ${span(oldest)}` : "nobody waits";
}

const sum = (items, field) => items.reduce((total, item) => total + item[field], 0);

function showWorkers({ workers }) {
  rows(at("workers"), workers, (worker) => worker.id, (worker) => [
    {
      text: worker.id,
      sub: words(worker.variant, worker.reason, worker.doubt),
      narrow: words(`${count(worker.running)} running`, worker.waiting && `${count(worker.waiting)} waiting`, `KV ${share(worker.kv_usage)}`),
    },
    { text: worker.state, kind: `state ${worker.state}`, title: worker.reason || worker.state },
    {
      text: `${count(worker.slots_held)} / ${count(worker.slots)}`,
      title: `${worker.slots_held} held, ${worker.slots} open now, ${worker.slots_most} at most`,
      bar: worker.slots ? worker.slots_held / worker.slots : 0,
    },
    { text: count(worker.running) },
    { text: count(worker.waiting) },
    { text: share(worker.kv_usage), bar: worker.kv_usage ?? 0 },
  ]);
}

function showQueue({ queue, queue_left_out: leftOut, workers }) {
  const flows = queue ? queue.flows : [];
  const routes = new Map((queue ? queue.routes : []).map((route) => [route.workers.join(), route]));
  const variants = new Map(workers.map((worker) => [worker.id, worker.variant]));
  const nobody = at("queue").nextElementSibling;
  say(nobody, queue ? "Nobody waits." : "The queue cannot be seen now.");
  rows(at("queue"), flows, (flow) => [flow.band, flow.tenant, ...flow.workers].join(), (flow) => {
    const route = routes.get(flow.workers.join());
    const wait = route?.drain_per_s ? route.expected_wait_s[flow.band] : null;
    return [
      {
        text: flow.tenant,
        sub: `for ${[...new Set(flow.workers.map((id) => variants.get(id) ?? id))].join(", ")}`,
        narrow: flow.band,
      },
      { text: flow.band },
      { text: count(flow.depth) },
      { text: span(flow.oldest_s) },
      { text: span(wait), title: "the wait of who comes now, at the present rate" },
      { text: route?.drain_per_s ? `${rate(route.drain_per_s)} /s` : NONE },
    ];
  });
  say(at("queue-more"), leftOut ? `the longest waits; ${count(leftOut)} more` : "");
}

function showModels({ models }) {
  const variants = models.flatMap((model) => model.variants);
  rows(at("models"), variants, (variant) => variant.public_name, (variant) => [
    {
      text: variant.public_name,
      sub: words(variant.quantization, variant.context_length && `${count(variant.context_length)} tokens of context`, cardOf(variant)),
      narrow: variant.pace.ttft_p95_s === null ? "" : `TTFT p95 ${span(variant.pace.ttft_p95_s)}`,
    },
    { text: `${variant.ready} / ${variant.workers}`, kind: variant.ready ? "" : "none" },
    { text: span(variant.pace.ttft_p50_s) },
    { text: span(variant.pace.ttft_p95_s) },
    { text: rate(variant.pace.tokens_per_s) },
  ]);
}

function cardOf({ card }) {
  if (!card) return "";
  return words(
    card.quality !== null && `${share(card.quality)} of dense quality`,
    bytes(card.size_bytes),
    card.tokens_per_s !== null && `measured ${rate(card.tokens_per_s)} tokens/s at ${count(card.streams)} streams`,
    card.passes === false && "fails its gate",
  );
}

function showBatches({ at: now, batches }) {
  say(at("batches").nextElementSibling, batches ? "No batch is unfinished." : "None are kept here, or their storage does not answer.");
  rows(at("batches"), batches ?? [], (batch) => batch.id, (batch) => [
    { text: batch.id, sub: words(batch.model, batch.tenant), narrow: batch.status.replace("_", " ") },
    { text: batch.status.replace("_", " ") },
    {
      text: batch.total ? `${count(batch.completed + batch.failed)} / ${count(batch.total)}` : NONE,
      bar: batch.total ? (batch.completed + batch.failed) / batch.total : 0,
    },
    { text: count(batch.failed) },
    { text: batch.expires_at > now ? span(batch.expires_at - now) : "over" },
  ]);
}

function showRefusals({ at: now, refusals }) {
  const keyOf = (kind) => [kind.outcome, kind.code, kind.model, kind.tenant, kind.band].join();
  rows(at("refusals"), refusals, keyOf, (kind) => [
    { text: kind.code, sub: words(kind.outcome, kind.model) },
    { text: kind.tenant },
    { text: kind.band },
    { text: count(kind.count), title: `since ${span(now - kind.first_at)}` },
    { text: agoOf(now - kind.last_at) },
  ]);
}

const agoOf = (seconds) => (seconds < 1 ? "now" : span(Math.round(seconds)));
