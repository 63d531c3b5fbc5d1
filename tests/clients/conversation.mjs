// Conversations by the official client; prints what each brought as a line of JSON. Arguments: base URL, model, modes.
import OpenAI, { toFile } from "openai";

const [baseURL, model, ...asked] = process.argv.slice(2);
const client = new OpenAI({ baseURL, maxRetries: 0, timeout: 60_000 });
const request = {
  model,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  max_tokens: 16,
  temperature: 0,
};

async function streamed(options) {
  const stream = await client.chat.completions.create({ ...request, ...options, stream: true });
  const told = { content: "", finish: null, usage: null, chunks: 0 };
  for await (const chunk of stream) {
    told.chunks += 1;
    told.content += chunk.choices[0]?.delta?.content ?? "";
    told.finish = chunk.choices[0]?.finish_reason ?? told.finish;
    told.usage = chunk.usage ?? told.usage;
  }
  return told;
}

async function cancelled() {
  const stream = await client.chat.completions.create({
    ...request, max_tokens: 512, ignore_eos: true, x_timing: { decode_s: 0.02 }, stream: true,
  });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) break; // leaving the loop aborts the request
  }
  return { aborted: stream.controller.signal.aborted };
}

// What the client itself skips is counted on a copy of the body.
async function queued() {
  let copy;
  const observing = async (url, init) => {
    const response = await fetch(url, init);
    const [mine, theirs] = response.body.tee();
    copy = new Response(mine).text();
    return new Response(theirs, { status: response.status, headers: response.headers });
  };
  const observed = new OpenAI({ baseURL, maxRetries: 0, timeout: 60_000, fetch: observing });
  const headers = { "x-sluice-queue-events": "1" };
  const stream = await observed.chat.completions.create({ ...request, stream: true }, { headers });
  let content = "";
  for await (const chunk of stream) content += chunk.choices[0]?.delta?.content ?? "";
  return { content, comments: (await copy).split(": sluice-queue ").length - 1 };
}

const parsed = async (id) => (await (await client.files.content(id)).text()).trim().split("\n").map(JSON.parse);

async function batch() {
  const url = "/v1/chat/completions";
  const { model, messages } = request;
  const line = (body, number) => JSON.stringify({ custom_id: `c${number}`, method: "POST", url, body });
  const bodies = [{ model, messages }, { model, messages, temperature: -1 }, { model, messages, max_tokens: 2 }];
  const input = await toFile(Buffer.from(bodies.map(line).join("\n")), "input.jsonl");
  const file = await client.files.create({ file: input, purpose: "batch" });
  const asked = { input_file_id: file.id, endpoint: url, completion_window: "24h", metadata: { run: "7" } };
  let made = await client.batches.create(asked);
  while (!["completed", "failed", "expired", "cancelled"].includes(made.status)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    made = await client.batches.retrieve(made.id);
  }
  const output = await parsed(made.output_file_id);
  const errors = await parsed(made.error_file_id);
  const listed = [];
  for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);
  const { deleted } = await client.files.delete(file.id);
  return { made, output, errors, listed, deleted };
}

const modes = {
  chat: async () => {
    const { data, request_id } = await client.chat.completions.create(request).withResponse();
    const [choice] = data.choices;
    return { content: choice.message.content, finish: choice.finish_reason, usage: data.usage, request_id };
  },
  stream: () => streamed({}),
  usage: () => streamed({ stream_options: { include_usage: true } }),
  models: async () => ({ ids: (await client.models.list()).data.map((entry) => entry.id) }),
  broken: () => streamed({ x_fault: "die_after:3" }),
  missing: () => client.chat.completions.create({ ...request, model: "nobody" }),
  batch,
  wrong: () => client.batches.create({ input_file_id: "file-none", endpoint: "/v1/chat/completions", completion_window: "24h" }),
  cancelled,
  queued,
};

for (const mode of asked) {
  try {
    console.log(JSON.stringify(await modes[mode]()));
  } catch (error) {
    const { status, code, type, param } = error;
    console.log(JSON.stringify({ error: { name: error.constructor.name, status, code, type, param } }));
  }
}
