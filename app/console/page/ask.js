// The prompt box: one question at a time, its answer as it comes, and how long each part of it took.

import { at, say } from "./draw.js";
import { errorOf, events, showing } from "./events.js";
import { NONE, count, rate, span } from "./format.js";

const QUEUE = /^sluice-queue (.*)$/;

/** Let the form ask; `keyOf()` is the key to show. */
export function open(keyOf) {
  const form = at("ask");
  let asked = null;
  const finish = () => {
    asked = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    at("answer").removeAttribute("aria-busy");
  };
  form.addEventListener("submit", (submitted) => {
    submitted.preventDefault();
    if (asked) return;
    asked = new AbortController();
    at("send").disabled = true;
    at("stop").disabled = false;
    ask(form, keyOf(), asked.signal).finally(finish);
  });
  at("stop").addEventListener("click", () => asked?.abort());
  form.addEventListener("keydown", (pressed) => {
    if (pressed.key === "Enter" && (pressed.ctrlKey || pressed.metaKey)) form.requestSubmit();
  });
}

/** Offer these names, and keep what was chosen. */
export function offer(names) {
  const list = at("model");
  if (names.join("\n") === [...list.options].map((option) => option.value).join("\n")) return;
  const chosen = list.value;
  list.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) list.value = chosen;
}

async function ask(form, key, signal) {
  const told = new Telling(performance.now());
  try {
    const response = await fetch("console/chat/completions", {
      method: "POST",
      headers: showing(key, { "content-type": "application/json", "x-sluice-queue-events": "1" }),
      body: JSON.stringify(bodyOf(form)),
      signal,
    });
    if (!response.ok) return told.failed(await errorOf(response));
    told.granted({ queue_ms: response.headers.get("x-sluice-queue-ms"), variant: response.headers.get("x-sluice-variant") });
    for await (const event of events(response.body)) told.heard(event);
    told.ended();
  } catch {
    if (signal.aborted) told.stopped();
    else told.failed({ message: "The connection broke before the answer was whole." });
  }
}

function bodyOf(form) {
  const { prompt, model, band, most } = form.elements;
  return {
    model: model.value,
    messages: [{ role: "user", content: prompt.value }],
    max_tokens: Number(most.value),
    service_tier: band.value,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Shows one answer. Times are this browser's: from the click to the first token that it got. */
class Telling {
  constructor(began) {
    this.began = began;
    this.first = null;
    this.tokens = 0;
    this.isBroken = false;
    for (const name of ["ttft", "queue", "variant", "pace"]) say(at(`asked-${name}`), NONE);
    at("answer").replaceChildren();
    at("answer").setAttribute("aria-busy", "true");
    this.progress("Sent");
  }

  progress(text, isAlarm = false) {
    say(at("progress"), text);
    at("progress").classList.toggle("alarm", isAlarm);
  }

  heard({ comment, data }) {
    if (comment !== undefined) return this.queued(QUEUE.exec(comment)?.[1]);
    if (data === "[DONE]") return;
    const { choices, usage, error } = JSON.parse(data);
    if (error) return this.failed(error);
    if (usage) this.tokens = usage.completion_tokens;
    const delta = choices?.[0]?.delta;
    const text = (delta?.reasoning_content ?? delta?.reasoning ?? "") + (delta?.content ?? "");
    if (text) this.token(text);
  }

  queued(line) {
    if (!line) return;
    const facts = Object.fromEntries(line.matchAll(/(\w+)=(\S+)/g).map(([, name, value]) => [name, value]));
    if (facts.queue_ms) this.granted(facts);
    else {
      const wait = Number(facts.wait_ms) ? `, about ${span(Number(facts.wait_ms) / 1000)}` : "";
      this.progress(`Waiting for a slot: ${facts.position} of ${facts.of}${wait}`);
    }
  }

  granted({ queue_ms: queueMs, variant }) {
    if (queueMs === null) return;
    say(at("asked-queue"), span(Number(queueMs) / 1000));
    say(at("asked-variant"), variant);
    at("asked-variant").title = variant;
    this.progress("Waiting for the first token");
  }

  token(text) {
    if (this.first === null) {
      this.first = performance.now();
      say(at("asked-ttft"), span((this.first - this.began) / 1000));
      this.progress("Answering");
    }
    const answer = at("answer");
    const follows = answer.scrollTop + answer.clientHeight >= answer.scrollHeight - 24;
    answer.append(text);
    if (follows) answer.scrollTop = answer.scrollHeight;
  }

  ended() {
    if (this.isBroken) return;
    const took = (performance.now() - this.began) / 1000;
    if (this.tokens > 1 && this.first !== null) {
      say(at("asked-pace"), rate((this.tokens - 1) / Math.max(0.001, (performance.now() - this.first) / 1000)));
    }
    this.progress(`Done: ${count(this.tokens)} tokens in ${span(took)}`);
  }

  stopped() {
    this.progress("Stopped");
  }

  failed({ message }) {
    this.isBroken = true;
    this.progress(message, true);
  }
}
