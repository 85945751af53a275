// Talks to the server: errors in words, server-sent events, and a request as a curl command.
// A key, where one is needed, was given to the browser when it opened the page; it sends it by itself.

/** An answer that is not the one wanted, in words for people. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/**
 * The address of a path of the server, which is relative: the page also works under a proxy's prefix.
 * A name and a password in the page's own address are left out: no request may carry them.
 */
function addressOf(path) {
  const url = new URL(path, document.baseURI);
  url.username = url.password = url.hash = "";
  return url.href;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(addressOf(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const late = error.name === "TimeoutError";
    throw new ApiError(late ? "The server did not answer in time." : "The server cannot be reached.");
  }
  if (!response.ok) {
    throw new ApiError(await messageOf(response), response.status);
  }
  return response;
}

/** What the server says went wrong: OpenAI's error body, FastAPI's, or the status alone. */
async function messageOf(response) {
  const fallback = response.statusText || "The server refused the request.";
  const text = await response.text().catch(() => "");
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    return fallback; // A proxy's page, perhaps: its markup would tell nobody anything.
  }
  const found = body?.error?.message ?? body?.message ?? body?.detail;
  return typeof found === "string" && found ? found.slice(0, 2000) : fallback;
}

export async function getJson(path, timeoutMs = 5000) {
  const response = await ask(path, { signal: AbortSignal.timeout(timeoutMs) });
  try {
    return await response.json();
  } catch {
    throw new ApiError("The server's answer is not complete JSON.");
  }
}

/** Posts a body with stream: true and yields the events as objects. */
export async function* streamEvents(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    throw new ApiError("The server's answer is not an event stream.", response.status);
  }
  let done = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent an event that is not JSON.");
    }
    if (event.error) throw new ApiError(event.error.message ?? "The server failed.", event.error.status);
    yield event;
  }
  if (!done) throw new ApiError("The connection ended before the answer did.");
}

/** The data of each server-sent event of a byte stream, wherever the pieces are cut. */
export async function* eventData(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await readOn(reader);
      buffer += value ? decoder.decode(value, { stream: true }) : decoder.decode();
      // A line ends with \n, \r\n or \r; of a \r that comes last the \n may still be on its way.
      let match;
      let start = 0;
      const ends = done ? /\r\n|\n|\r/g : /\r\n|\n|\r(?!$)/g;
      while ((match = ends.exec(buffer))) {
        const line = buffer.slice(start, match.index);
        start = ends.lastIndex;
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      buffer = buffer.slice(start);
      if (done) return; // An event that was not finished by an empty line is no event.
    }
  } finally {
    await reader.cancel().catch(() => {}); // The stream may have failed already; nobody reads on.
  }
}

async function readOn(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer ended.");
  }
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A shell command that sends the same request; a key, where one is needed, is in a variable. */
export function curlCommand(path, body, needsKey) {
  const lines = [
    `curl -N ${quote(addressOf(path))}`,
    `-H ${quote("Content-Type: application/json")}`,
    `-d ${quote(JSON.stringify(body, null, 2))}`,
  ];
  if (needsKey) lines.splice(2, 0, '-H "Authorization: Bearer $NANOFLOW_API_KEY"');
  return lines.join(" \\\n  ");
}
