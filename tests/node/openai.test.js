// The official `openai` client: nothing but the base URL differs.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { KEY, MESSAGES, MODEL, TEXT, TOOL_MODEL, URL_BASE } from "./gateway.js";

const client = new OpenAI({ baseURL: URL_BASE, apiKey: KEY, maxRetries: 0, timeout: 20_000 });
const TOOLS = [{ type: "function", function: { name: "take_note", parameters: { type: "object", properties: { text: { type: "string" } } } } }];

test("a whole answer", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages: MESSAGES });
  assert.match(answer.id, /^gen-/);
  assert.equal(answer.choices[0].message.content, TEXT);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.ok(answer.usage.completion_tokens > 0);
});

test("a stream", async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages: MESSAGES, stream: true, stream_options: { include_usage: true } });
  const parts = [];
  for await (const part of stream) parts.push(part);
  assert.equal(parts.map((part) => part.choices[0]?.delta?.content ?? "").join(""), TEXT);
  assert.deepEqual(parts.flatMap((part) => part.choices.map((choice) => choice.finish_reason)).filter(Boolean), ["stop"]);
  assert.ok(parts.at(-1).usage.total_tokens > 0);
  assert.equal(new Set(parts.map((part) => part.id)).size, 1);
});

test("a stream that is left", async () => {
  const stream = await client.chat.completions.create({ model: MODEL, messages: MESSAGES, stream: true });
  for await (const part of stream) {
    assert.equal(part.model, MODEL);
    break;
  }
});

test("a tool call, its result, and the answer to that", async () => {
  const asked = await client.chat.completions.create({ model: TOOL_MODEL, messages: MESSAGES, tools: TOOLS });
  const { message, finish_reason } = asked.choices[0];
  assert.equal(finish_reason, "tool_calls");
  const [call] = message.tool_calls;
  assert.equal(call.function.name, "take_note");
  assert.equal(typeof JSON.parse(call.function.arguments).text, "string");
  const messages = [...MESSAGES, message, { role: "tool", tool_call_id: call.id, content: "noted" }];
  const answer = await client.chat.completions.create({ model: MODEL, messages, tools: TOOLS });
  assert.equal(answer.choices[0].message.content, TEXT);
});

test("tool calls of a stream, put together by the client", async () => {
  const final = await client.chat.completions.stream({ model: TOOL_MODEL, messages: MESSAGES, tools: TOOLS }).finalChatCompletion();
  const [call] = final.choices[0].message.tool_calls;
  assert.equal(call.function.name, "take_note");
  assert.equal(typeof JSON.parse(call.function.arguments).text, "string");
});

test("legacy completions", async () => {
  const answer = await client.completions.create({ model: MODEL, prompt: "Once" });
  assert.equal(answer.choices[0].text, TEXT);
});

test("one model by its name", async () => {
  const model = await client.models.retrieve(MODEL);
  assert.deepEqual([model.id, model.object, model.owned_by], [MODEL, "model", "acme"]);
  await assert.rejects(client.models.retrieve("acme/nothing"), OpenAI.NotFoundError);
});

test("a wish that is not served is a bad request that says what it was", async () => {
  const asked = client.chat.completions.create({ model: `${MODEL}:online`, messages: MESSAGES });
  await assert.rejects(asked, (error) => error instanceof OpenAI.BadRequestError && error.message.includes("web search"));
});

test("the list of models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids.sort(), [MODEL, TOOL_MODEL]);
});

test("refusals are the errors of the client", async () => {
  const wrong = new OpenAI({ baseURL: URL_BASE, apiKey: "sk-or-v1-wrong", maxRetries: 0 });
  await assert.rejects(wrong.chat.completions.create({ model: MODEL, messages: MESSAGES }), OpenAI.AuthenticationError);
  await assert.rejects(client.chat.completions.create({ model: "acme/none", messages: MESSAGES }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.match(error.message, /acme\/none/);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ model: MODEL, messages: "no list" }), OpenAI.BadRequestError);
});
