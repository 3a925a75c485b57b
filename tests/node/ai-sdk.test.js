// The AI SDK with OpenRouter's provider for it.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenRouter } from "@openrouter/ai-sdk-provider";
import { APICallError, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { KEY, MODEL, TEXT, TOOL_MODEL, URL_BASE } from "./gateway.js";

const provider = (apiKey = KEY) => createOpenRouter({ baseURL: URL_BASE, apiKey, compatibility: "strict" });
const prompt = "Tell me about rivers.";

test("a whole answer, with what it cost", async () => {
  const answer = await generateText({ model: provider().chat(MODEL, { usage: { include: true } }), prompt, maxRetries: 0 });
  assert.equal(answer.text, TEXT);
  assert.equal(answer.finishReason, "stop");
  assert.ok(answer.usage.outputTokens > 0);
  assert.ok(answer.providerMetadata.openrouter.usage.cost > 0);
  assert.equal(answer.providerMetadata.openrouter.provider, "North");
});

test("a stream", async () => {
  const failures = [];
  const stream = streamText({ model: provider().chat(MODEL), prompt, maxRetries: 0, onError: ({ error }) => failures.push(error) });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.deepEqual(failures, []);
  assert.equal(text, TEXT);
  assert.equal(await stream.finishReason, "stop");
  assert.ok((await stream.usage).outputTokens > 0);
});

for (const run of ["generate", "stream"]) {
  test(`a tool is called and its result answered (${run})`, async () => {
    const notes = [];
    const takeNote = tool({
      description: "Keeps a note",
      inputSchema: z.object({ text: z.string() }),
      execute: async ({ text }) => notes.push(text),
    });
    const asked = {
      model: provider().chat(TOOL_MODEL),
      prompt,
      tools: { take_note: takeNote },
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => (stepNumber ? { model: provider().chat(MODEL) } : {}),
      maxRetries: 0,
    };
    const answer = run === "generate" ? await generateText(asked) : streamText(asked);
    if (run === "stream") await answer.consumeStream();
    assert.equal(await answer.text, TEXT);
    assert.equal(notes.length, 1);
  });
}

test("the legacy completions", async () => {
  const answer = await generateText({ model: provider().completion(MODEL), prompt, maxRetries: 0 });
  assert.equal(answer.text, TEXT);
});

test("refusals are errors of the call, with our words", async () => {
  await assert.rejects(generateText({ model: provider("sk-or-v1-wrong").chat(MODEL), prompt, maxRetries: 0 }), (error) => {
    assert.ok(APICallError.isInstance(error));
    assert.equal(error.statusCode, 401);
    return true;
  });
  await assert.rejects(generateText({ model: provider().chat("acme/none"), prompt, maxRetries: 0 }), (error) => {
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /acme\/none/);
    return true;
  });
});
