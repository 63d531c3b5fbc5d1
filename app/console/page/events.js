// Server-sent events, read with fetch: an EventSource can show no key but in its address, where keys end up in logs.

/** The events of a streamed body: {event, data}, and {comment} for a line that begins with a colon. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let current = { event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (current.data.length) yield { event: current.event, data: current.data.join("\n") };
          current = { event: "message", data: [] };
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else {
          const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
          if (field === "data") current.data.push(text);
          if (field === "event") current.event = text;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Headers that show the key, if there is one. */
export function showing(key, headers = {}) {
  return key ? { ...headers, authorization: `Bearer ${key}` } : headers;
}

/** What an error answer says: OpenAI's error object, or at least its status. */
export async function errorOf(response) {
  try {
    const { error } = await response.json();
    return { code: error.code, message: error.message };
  } catch {
    return { code: "", message: `The gateway answered ${response.status}.` };
  }
}
