// Uses every feature of the server through the openai SDK of Node, as its users do.
//
// Run by `clients_test.py`: `NODE_PATH=... node openai_features.cjs URL KEY`. Says one line per
// feature; ends with code 1 at the first that fails.

"use strict";

const assert = require("node:assert/strict");
const OpenAI = require("openai");

const PROMPT = "def main():";
const FIXED = { model: "embedded", max_tokens: 12, temperature: 0 };
const ASK = [{ role: "user", content: "What does textwrap.dedent do?" }];
const CITIES = ["Oslo", "Rome"];
const SCHEMA = {
  type: "object",
  properties: { city: { enum: CITIES }, ok: { type: "boolean" } },
  required: ["city", "ok"],
  additionalProperties: false,
};
const TOOLS = ["weather", "time"].map((name) => ({
  type: "function",
  function: { name, description: "Of a city.", parameters: SCHEMA },
}));
// A small model at a loss writes white space for ever, where JSON allows any.
const NO_LOOPS = { frequency_penalty: 2 };
const MUST_END_MS = 120_000;

async function all(stream) {
  const found = [];
  for await (const item of stream) found.push(item);
  return found;
}

function choicesOf(chunks, index = 0) {
  return chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.index === index);
}

async function waitFor(check, what) {
  const deadline = Date.now() + MUST_END_MS;
  for (;;) {
    const found = await check();
    if (found) return found;
    assert.ok(Date.now() < deadline, what);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

async function models(client) {
  assert.deepEqual((await all(await client.models.list())).map((m) => m.id), ["embedded"]);
  assert.equal((await client.models.retrieve("embedded")).owned_by, "nanoflow_jax");
}

async function completionAndItsStream(client) {
  const asked = { ...FIXED, prompt: PROMPT, logprobs: 2, n: 2 };
  const whole = await client.completions.create(asked);
  assert.equal(whole.object, "text_completion");
  const chunks = await all(
    await client.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    }),
  );
  for (const choice of whole.choices) {
    const parts = choicesOf(chunks, choice.index);
    assert.equal(parts.map((part) => part.text).join(""), choice.text);
    for (const name of ["tokens", "token_logprobs", "top_logprobs", "text_offset"]) {
      const told = parts.flatMap((part) => (part.logprobs ? part.logprobs[name] : []));
      assert.deepEqual(told, choice.logprobs[name]);
    }
    assert.equal(parts.at(-1).finish_reason, choice.finish_reason);
  }
  const last = chunks.at(-1);
  assert.deepEqual(last.choices, []);
  assert.deepEqual(last.usage, whole.usage);
  assert.equal(typeof last.usage.prompt_tokens_details.cached_tokens, "number");
}

async function echoWithPromptLogprobs(client) {
  const asked = { ...FIXED, prompt: PROMPT, echo: true, logprobs: 1 };
  const whole = (await client.completions.create(asked)).choices[0];
  assert.ok(whole.text.startsWith(PROMPT));
  assert.equal(whole.logprobs.token_logprobs[0], null);
  assert.equal(whole.logprobs.tokens.length, whole.logprobs.text_offset.length);
  const parts = choicesOf(await all(await client.completions.create({ ...asked, stream: true })));
  assert.equal(parts.map((part) => part.text).join(""), whole.text);
}

async function promptsAsTokenIdsAndSeveralAtOnce(client) {
  const shown = (
    await client.completions.create({ ...FIXED, prompt: PROMPT, return_token_ids: true })
  ).choices[0];
  const ids = shown.prompt_token_ids;
  const again = await client.completions.create({ ...FIXED, prompt: ids });
  assert.equal(again.choices[0].text, shown.text);
  const many = await client.completions.create({ ...FIXED, prompt: [ids, ids], n: 2 });
  assert.deepEqual(many.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  assert.ok(many.choices.every((choice) => choice.text === shown.text));
  const two = { ...FIXED, prompt: [PROMPT, "import"] };
  const texts = (await client.completions.create(two)).choices.map((choice) => choice.text);
  const chunks = await all(await client.completions.create({ ...two, stream: true }));
  const streamed = [0, 1].map((i) => choicesOf(chunks, i).map((part) => part.text).join(""));
  assert.deepEqual(streamed, texts);
}

async function sampling(client) {
  const text = async (fields = {}) =>
    (await client.completions.create({ ...FIXED, prompt: PROMPT, ...fields })).choices[0].text;
  const plain = await text();
  const drawn = { temperature: 1, seed: 7, max_tokens: 20 };
  assert.equal(await text(drawn), await text(drawn));
  assert.equal(await text({ ...drawn, top_p: 1e-6 }), await text({ max_tokens: 20 }));
  assert.equal(await text({ ...drawn, top_k: 1, min_p: 0.1 }), await text({ max_tokens: 20 }));
  const long = { max_tokens: 40 };
  const penalties = { presence_penalty: 2, frequency_penalty: 2 };
  assert.notEqual(await text({ ...long, ...penalties }), await text(long));
  const stop = plain.trim().slice(0, 4);
  const cut = (await client.completions.create({ ...FIXED, prompt: PROMPT, stop })).choices[0];
  assert.equal(cut.finish_reason, "stop");
  assert.ok(!cut.text.includes(stop));
  const only = { max_tokens: 4, logit_bias: { 100: 100 } };
  assert.equal(await text(only), await text({ max_tokens: 4, allowed_token_ids: [100] }));
  const word = plain.split(/\s+/).filter(Boolean)[0];
  assert.ok(!(await text({ bad_words: [word] })).includes(word));
}

async function chatAndItsStream(client) {
  const asked = {
    ...{ model: "embedded", messages: ASK, temperature: 0, max_completion_tokens: 12 },
    ...{ logprobs: true, top_logprobs: 2, n: 2 },
  };
  const whole = await client.chat.completions.create(asked);
  const chunks = await all(
    await client.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    }),
  );
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  for (const choice of whole.choices) {
    const parts = choicesOf(chunks, choice.index);
    const told = parts.map((part) => part.delta.content ?? "").join("");
    assert.equal(told, choice.message.content);
    assert.deepEqual(
      parts.flatMap((part) => part.logprobs?.content ?? []),
      choice.logprobs.content,
    );
    assert.equal(parts.at(-1).finish_reason, choice.finish_reason);
  }
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
}

async function chatHelpers(client) {
  const runner = client.chat.completions.stream({
    ...{ model: "embedded", messages: ASK, max_completion_tokens: 20, seed: 1 },
  });
  let told = "";
  runner.on("content", (delta) => (told += delta));
  const final = await runner.finalChatCompletion();
  assert.equal(told, final.choices[0].message.content);
}

async function chatThatGoesOnWithAnAnswer(client) {
  const asked = { ...FIXED, messages: [...ASK, { role: "assistant", content: "It removes" }] };
  const after = await client.chat.completions.create(asked);
  const goingOn = await client.chat.completions.create({ ...asked, continue_final_message: true });
  assert.ok(goingOn.usage.prompt_tokens < after.usage.prompt_tokens);
}

async function structuredAnswers(client) {
  const said = async (fields, stream) => {
    const asked = { ...FIXED, ...NO_LOOPS, max_tokens: 80, messages: ASK, ...fields, stream };
    const answer = await client.chat.completions.create(asked);
    if (!stream) return answer.choices[0].message.content;
    return choicesOf(await all(answer)).map((part) => part.delta.content ?? "").join("");
  };
  const form = { type: "json_schema", json_schema: { name: "x", schema: SCHEMA, strict: true } };
  for (const stream of [false, true]) {
    assert.ok(CITIES.includes(JSON.parse(await said({ response_format: form }, stream)).city));
    const any = await said({ response_format: { type: "json_object" } }, stream);
    assert.ok(any.trimStart().startsWith("{"));
    for (const [outputs, wanted] of [
      [{ regex: "(ab){3}" }, ["ababab"]],
      [{ choice: ["yes", "no"] }, ["yes", "no"]],
      [{ grammar: 'start: "x" | "yy"' }, ["x", "yy"]],
    ]) {
      assert.ok(wanted.includes(await said({ structured_outputs: outputs }, stream)));
    }
  }
}

async function toolCalls(client) {
  const asked = { ...FIXED, messages: ASK, max_tokens: 110, tools: TOOLS };
  const named = { type: "function", function: { name: "time" } };
  for (const [choice, names] of [["required", ["weather", "time"]], [named, ["time"]]]) {
    const fields = { ...asked, tool_choice: choice, parallel_tool_calls: false };
    const answer = (await client.chat.completions.create(fields)).choices[0];
    assert.equal(answer.finish_reason, "tool_calls");
    const [call, ...others] = answer.message.tool_calls;
    assert.deepEqual(others, []);
    assert.ok(names.includes(call.function.name));
    assert.ok(CITIES.includes(JSON.parse(call.function.arguments).city));
    const parts = choicesOf(
      await all(await client.chat.completions.create({ ...fields, stream: true })),
    );
    const deltas = parts.flatMap((part) => part.delta.tool_calls ?? []);
    assert.equal(deltas[0].function.name, call.function.name);
    const streamed = deltas.map((delta) => delta.function.arguments ?? "").join("");
    assert.equal(streamed, call.function.arguments);
    assert.equal(parts.at(-1).finish_reason, "tool_calls");
  }
  for (const choice of ["auto", "none"]) {
    const free = (await client.chat.completions.create({ ...asked, tool_choice: choice })).choices;
    assert.ok(free[0].message.content || free[0].message.tool_calls);
  }
}

function rows(count, body = {}) {
  const made = Array.from({ length: count }, (_, i) => ({
    custom_id: `row-${i}`,
    method: "POST",
    url: "/v1/completions",
    body: { ...FIXED, prompt: `def f${i}(`, ...body },
  }));
  return made.map((row) => JSON.stringify(row) + "\n").join("");
}

async function upload(client, data) {
  const file = await OpenAI.toFile(Buffer.from(data), "in.jsonl");
  return client.files.create({ file, purpose: "batch" });
}

function newBatch(client, file) {
  return client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/completions",
    completion_window: "24h",
  });
}

async function status(client, batch) {
  return (await client.batches.retrieve(batch.id)).status;
}

async function filesAndBatches(client) {
  const data = rows(2) + JSON.stringify({ custom_id: "bad", prompt: 3 }) + "\n";
  const file = await upload(client, data);
  assert.equal(file.bytes, data.length);
  assert.equal(await (await client.files.content(file.id)).text(), data);
  assert.ok((await all(await client.files.list())).some((known) => known.id === file.id));
  const batch = await newBatch(client, file);
  assert.ok((await all(await client.batches.list())).some((known) => known.id === batch.id));
  await waitFor(async () => (await status(client, batch)) === "completed", "the batch ends");
  const done = await client.batches.retrieve(batch.id);
  assert.deepEqual(done.request_counts, { total: 3, completed: 2, failed: 1 });
  const lines = (await (await client.files.content(done.output_file_id)).text()).trim().split("\n");
  assert.deepEqual(lines.map((line) => JSON.parse(line).custom_id).sort(), ["row-0", "row-1"]);
  const failed = await (await client.files.content(done.error_file_id)).text();
  assert.equal(JSON.parse(failed).custom_id, "bad");
  assert.ok((await client.files.delete(file.id)).deleted);
}

async function aBatchCanBeCancelled(client) {
  const file = await upload(client, rows(60, { max_tokens: 200, ignore_eos: true }));
  const batch = await newBatch(client, file);
  await waitFor(async () => (await status(client, batch)) === "in_progress", "the batch begins");
  assert.ok(["cancelling", "cancelled"].includes((await client.batches.cancel(batch.id)).status));
  await waitFor(async () => (await status(client, batch)) === "cancelled", "it is cancelled");
}

async function errors(client) {
  const refused = async (kind, fields) => {
    const asked = { ...FIXED, prompt: PROMPT, ...fields };
    const error = await client.completions.create(asked).then(
      () => assert.fail(`${JSON.stringify(fields)} was served`),
      (found) => found,
    );
    assert.ok(error instanceof kind, String(error));
    return error;
  };
  assert.equal((await refused(OpenAI.BadRequestError, { temperature: -1 })).param, "temperature");
  const long = await refused(OpenAI.BadRequestError, { prompt: "x ".repeat(4000) });
  assert.equal(long.code, "context_length_exceeded");
  await refused(OpenAI.BadRequestError, { prompt: [[1], [1000000]], stream: true });
  assert.equal((await refused(OpenAI.NotFoundError, { model: "other" })).code, "model_not_found");
  const busy = await refused(OpenAI.RateLimitError, { n: 9 }); // more than the server's --max_queue
  assert.ok(Number(busy.headers.get("retry-after")) >= 1);
  await assert.rejects(client.models.retrieve("other"), OpenAI.NotFoundError);
  await assert.rejects(client.files.retrieve("file-none"), OpenAI.NotFoundError);
  await assert.rejects(client.batches.retrieve("batch_none"), OpenAI.NotFoundError);
  const stranger = client.withOptions({ apiKey: "wrong" });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
}

async function aStreamCanBeLeft(client) {
  const endless = { ...FIXED, max_tokens: 230, ignore_eos: true, stream: true };
  for (const stream of [
    await client.completions.create({ ...endless, prompt: PROMPT }),
    await client.chat.completions.create({ ...endless, messages: ASK }),
  ]) {
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break; // which aborts the request
    }
  }
  const isIdle = async () => {
    const stats = await client.get("/../page/stats");
    return stats.running === 0 && stats.waiting === 0 && stats.pages_used === 0;
  };
  await waitFor(isIdle, "streams that were left are dropped");
}

const FEATURES = [
  models,
  completionAndItsStream,
  echoWithPromptLogprobs,
  promptsAsTokenIdsAndSeveralAtOnce,
  sampling,
  chatAndItsStream,
  chatHelpers,
  chatThatGoesOnWithAnAnswer,
  structuredAnswers,
  toolCalls,
  filesAndBatches,
  aBatchCanBeCancelled,
  errors,
  aStreamCanBeLeft,
];

async function main(url, apiKey) {
  console.log("openai for Node", require("openai/version").VERSION);
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: MUST_END_MS });
  for (const feature of FEATURES) {
    const began = Date.now();
    await feature(client);
    console.log(`ok ${feature.name} (${((Date.now() - began) / 1000).toFixed(1)} s)`);
  }
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
