// Chat and completion: sends what is written, shows the answer as it comes, and what it cost.

import { ApiError, curlCommand, streamEvents } from "./api.js";
import { byId, count, make, plural, seconds, setText } from "./dom.js";

const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed", "n"];
const WORDS = {
  chat: {
    label: "Message",
    send: "Send",
    hint: "Enter sends, Shift+Enter starts a line.",
    welcome: "Say something to the model. The conversation stays in this tab.",
  },
  completion: {
    label: "Prompt",
    send: "Run",
    hint: "Enter runs, Shift+Enter starts a line.",
    welcome: "Write the beginning of a text. The model goes on from its last character.",
  },
};

export class Playground {
  constructor() {
    this.needsKey = false; // Of those who do not come with a browser, as curl.
    this._turns = []; // Of the chat, as the API has them, without the system prompt.
    this._lastBody = { chat: null, completion: null };
    this._drafts = { chat: "", completion: "" };
    this._abort = null;
    this._text = byId("text");
    this._log = byId("log");
    this._mode = document.querySelector("input[name=mode]:checked").value;
    this._listen();
    this._showMode();
    this._noteParameters();
  }

  /** Offers the names that /v1/models gave. */
  setModels(names) {
    const select = byId("model");
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
  }

  /** Shows an error above the place to write. */
  showProblem(error) {
    const hint = this._mode === "chat" && error.status === 400 && /template/i.test(error.message);
    setText(byId("problem-text"), error.status ? `${error.status}: ${error.message}` : error.message);
    byId("problem-switch").hidden = !hint;
    byId("problem").hidden = false;
  }

  _listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    this._text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this._send();
      } else if (event.key === "Escape") {
        this._abort?.abort();
      }
    });
    byId("stop").addEventListener("click", () => this._abort?.abort());
    byId("clear").addEventListener("click", () => this._clear());
    byId("show-curl").addEventListener("click", () => this._showCurl());
    byId("curl-copy").addEventListener("click", () => copy(byId("curl-copy"), byId("curl-text").textContent));
    byId("curl-close").addEventListener("click", () => byId("curl").close());
    byId("problem-close").addEventListener("click", () => this._hideProblem());
    byId("problem-switch").addEventListener("click", () => {
      const draft = this._text.value;
      document.querySelector("input[name=mode][value=completion]").click();
      if (!this._text.value) this._text.value = draft;
      this._hideProblem();
      this._text.focus();
    });
    byId("fields").addEventListener("submit", (event) => event.preventDefault());
    byId("fields").addEventListener("input", () => this._noteParameters());
    for (const radio of document.querySelectorAll("input[name=mode]")) {
      radio.addEventListener("change", () => {
        this._drafts[this._mode] = this._text.value;
        this._mode = radio.value;
        this._text.value = this._drafts[this._mode];
        this._showMode();
      });
    }
  }

  _showMode() {
    const words = WORDS[this._mode];
    setText(byId("text-label"), words.label);
    this._text.placeholder = words.label;
    setText(byId("text-hint"), words.hint);
    setText(byId("welcome"), words.welcome);
    byId("system-field").hidden = this._mode !== "chat";
    setText(byId("send"), words.send);
    this._text.classList.toggle("long", this._mode === "completion");
    for (const entry of this._log.children) entry.hidden = entry.dataset.mode !== this._mode;
    this._showWelcome();
  }

  _showWelcome() {
    byId("welcome").hidden = [...this._log.children].some((entry) => !entry.hidden);
  }

  /** What is set, in a line: on a phone the fields are folded away. */
  _noteParameters() {
    const set = NUMBERS.filter((name) => byId(name).value !== "");
    const shown = set.map((name) => `${name.replace("_", " ")} ${byId(name).value}`);
    if (byId("stop-strings").value.trim()) shown.push("stop");
    setText(byId("parameters-note"), shown.join(", "));
  }

  _body(text) {
    const body = { model: byId("model").value || undefined };
    if (this._mode === "chat") {
      const system = byId("system").value;
      body.messages = [
        ...(system.trim() ? [{ role: "system", content: system }] : []),
        ...this._turns,
        { role: "user", content: text },
      ];
    } else {
      body.prompt = text;
    }
    for (const name of NUMBERS) {
      if (byId(name).value !== "") body[name] = Number(byId(name).value);
    }
    const stops = stopStrings(byId("stop-strings").value);
    if (stops.length) body.stop = stops;
    return { ...body, stream: true, stream_options: { include_usage: true } };
  }

  _fieldsAreRight() {
    if (byId("fields").checkValidity()) return true;
    byId("parameters").open = true; // A field that is folded away could not show its complaint.
    byId("fields").reportValidity();
    return false;
  }

  async _send() {
    const text = this._text.value;
    if (this._abort || !text.trim() || !this._fieldsAreRight()) return;
    const mode = this._mode;
    const body = this._body(text);
    this._lastBody[mode] = body;
    this._hideProblem();
    const question = mode === "chat" ? message(mode, "user", "You", text) : null;
    const answer = new Answer(mode, body, (whole) => this._continueFrom(whole));
    this._log.append(...(question ? [question] : []), answer.element);
    if (mode === "chat") this._text.value = "";
    this._showWelcome();
    this._setBusy(true);
    scrollDown();
    const failure = await this._receive(mode, body, answer);
    if (answer.isEmpty && failure) {
      question?.remove();
      answer.element.remove();
      if (question) this._giveBack(text);
    } else if (mode === "chat") {
      const content = answer.text(0);
      this._turns.push({ role: "user", content: text }, { role: "assistant", content });
    }
    if (failure && failure !== "stopped") this.showProblem(failure);
    this._showWelcome();
  }

  /** Puts a message that got no answer back where it was written. */
  _giveBack(text) {
    if (this._mode === "chat") this._text.value = [text, this._text.value].filter(Boolean).join("\n");
    else this._drafts.chat = text;
  }

  /** @returns null, "stopped", or the error that ended the answer */
  async _receive(mode, body, answer) {
    this._abort = new AbortController();
    let failure = null;
    try {
      for await (const event of streamEvents(PATHS[mode], body, this._abort.signal)) {
        answer.take(event);
      }
    } catch (error) {
      if (error.name === "AbortError") failure = "stopped";
      else if (error instanceof ApiError) failure = error;
      else throw error;
    } finally {
      this._abort = null;
      this._setBusy(false);
      answer.finish(failure);
    }
    return failure;
  }

  _setBusy(busy) {
    const [send, stop] = [byId("send"), byId("stop")];
    this._log.setAttribute("aria-busy", busy);
    const focused = [send, stop].includes(document.activeElement);
    send.hidden = busy;
    stop.hidden = !busy;
    byId("clear").disabled = busy;
    if (focused) (busy ? stop : send).focus();
  }

  _continueFrom(whole) {
    this._text.value = whole;
    this._text.focus();
    this._text.scrollTop = this._text.scrollHeight;
  }

  _clear() {
    for (const entry of [...this._log.children]) {
      if (entry.dataset.mode === this._mode) entry.remove();
    }
    if (this._mode === "chat") this._turns = [];
    this._hideProblem();
    this._showWelcome();
    this._text.focus();
  }

  _hideProblem() {
    byId("problem").hidden = true;
  }

  /** Of what is written now; else of what was sent last. */
  _showCurl() {
    if (!this._fieldsAreRight()) return;
    const written = this._text.value.trim() !== "";
    const body = (!written && this._lastBody[this._mode]) || this._body(this._text.value);
    setText(byId("curl-text"), curlCommand(PATHS[this._mode], body, this.needsKey));
    byId("curl-note").hidden = !this.needsKey;
    byId("curl").showModal();
  }
}

/** Stop strings, one a line; \n, \t and \\ mean what they mean in most languages. */
export function stopStrings(text) {
  const meant = { n: "\n", t: "\t", "\\": "\\" };
  return text
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replace(/\\([nt\\])/g, (_, letter) => meant[letter]));
}

function message(mode, role, name, ...children) {
  const entry = make("article", { class: `message ${role}` }, make("h3", {}, name));
  entry.dataset.mode = mode;
  entry.append(make("div", { class: "text" }, ...children));
  return entry;
}

async function copy(button, text) {
  let result = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    result = "Not allowed"; // The browser keeps the clipboard from pages that came over plain HTTP.
  }
  const before = button.textContent;
  if (before === "Copied" || before === "Not allowed") return;
  setText(button, result);
  setTimeout(() => setText(button, before), 1500);
}

/** Whether the reader is at the end of the page, and so wants to follow. */
function atEnd() {
  const { scrollHeight } = document.documentElement;
  return scrollHeight - window.innerHeight - window.scrollY < 120;
}

function scrollDown() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

/** An answer on the page: its choices, and the figures of its making. */
class Answer {
  constructor(mode, body, onContinue) {
    this._mode = mode;
    this._body = body;
    this._onContinue = onContinue;
    this._choices = new Map(); // By index: {node, reason, box}.
    this._start = performance.now();
    this._first = null;
    this._last = null;
    this._pieces = 0;
    this._usage = null;
    this._scrolling = false;
    this._figures = make("p", { class: "figures-line" }, "waiting for the first token");
    this.element = message(mode, "assistant", mode === "chat" ? "Model" : "Completion");
    this.element.classList.add("running");
    this._foot = make("div", { class: "foot" }, this._figures);
    this.element.append(this._foot);
  }

  get isEmpty() {
    return this._pieces === 0;
  }

  text(index) {
    return this._choices.get(index)?.node.data ?? "";
  }

  take(event) {
    this._usage = event.usage ?? this._usage;
    const follow = atEnd();
    for (const choice of event.choices ?? []) {
      const piece = choice.delta?.content ?? choice.text ?? "";
      if (piece) {
        this._last = performance.now();
        this._first ??= this._last;
        this._pieces += 1;
        this._choice(choice.index ?? 0).node.appendData(piece);
      }
      if (choice.finish_reason) this._choice(choice.index ?? 0).reason = choice.finish_reason;
    }
    if (this._first !== null) {
      const took = (performance.now() - this._start) / 1000;
      setText(this._figures, `writing, ${took.toFixed(1)} s`);
    }
    if (follow && !this._scrolling) {
      this._scrolling = true;
      requestAnimationFrame(() => {
        this._scrolling = false;
        scrollDown();
      });
    }
  }

  finish(failure) {
    this.element.classList.remove("running");
    const parts = this._measured();
    if (failure === "stopped") parts.push("stopped by you");
    else if (failure) parts.push("broken off");
    else parts.push(...this._reasons());
    setText(this._figures, parts.join(" · "));
    for (const { node, box } of this._choices.values()) {
      (this._choices.size > 1 ? box : this._foot).append(this._buttons(node));
    }
    if (this._choices.size > 1 && this._mode === "chat") {
      this._figures.append(" · the chat goes on from choice 1");
    }
  }

  /** The block of one choice, in order of its index, made when its first text comes. */
  _choice(index) {
    const known = this._choices.get(index);
    if (known) return known;
    const node = document.createTextNode("");
    const written = make("span", { class: "written" }, node);
    const text = make("div", { class: "text" });
    if (this._mode === "completion") text.append(make("span", { class: "given" }, this._body.prompt));
    text.append(written);
    const box = make("div", { class: "choice" }, text);
    box.dataset.index = index;
    if ((this._body.n ?? 1) > 1) box.prepend(make("h4", {}, `Choice ${index + 1}`));
    const holder = this.element.querySelector(".text");
    const after = [...holder.children].find((other) => Number(other.dataset.index) > index);
    holder.insertBefore(box, after ?? null);
    const choice = { node, box, reason: null };
    this._choices.set(index, choice);
    return choice;
  }

  _measured() {
    const parts = [];
    const tokens = this._usage?.completion_tokens;
    parts.push(tokens === undefined ? plural(this._pieces, "piece") : plural(tokens, "token"));
    const writing = this._first === null ? 0 : (this._last - this._first) / 1000;
    const later = (tokens ?? 0) - this._choices.size; // The first of each starts the clock.
    // Tokens that came together tell nothing of the speed.
    if (later > 0 && writing > 0.05) parts.push(`${count(later / writing)} tokens/s`);
    if (this._first !== null) parts.push(`first token ${seconds((this._first - this._start) / 1000)}`);
    if (this._usage) {
      const cached = this._usage.prompt_tokens_details?.cached_tokens;
      const note = cached ? ` (${count(cached)} cached)` : "";
      parts.push(`prompt ${plural(this._usage.prompt_tokens, "token")}${note}`);
    }
    return parts;
  }

  _reasons() {
    const reasons = new Set([...this._choices.values()].map(({ reason }) => reason).filter(Boolean));
    return [...reasons].map((reason) => `finish: ${reason}`);
  }

  _buttons(node) {
    const copyButton = make("button", { type: "button", class: "quiet" }, "Copy");
    copyButton.addEventListener("click", () => copy(copyButton, node.data));
    const row = make("p", { class: "buttons" }, copyButton);
    if (this._mode === "completion") {
      const goOn = make("button", { type: "button", class: "quiet" }, "Go on from here");
      goOn.addEventListener("click", () => this._onContinue(this._body.prompt + node.data));
      row.append(goOn);
    }
    return row;
  }
}
