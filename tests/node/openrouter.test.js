// OpenRouter's own client: it holds every answer against a schema, so one that parses keeps the contract.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";
import { OpenRouter } from "@openrouter/sdk";
import * as errors from "@openrouter/sdk/models/errors";
import { KEY, MANAGEMENT_KEY, MESSAGES, MODEL, TEXT, TOOL_MODEL, URL_BASE, soon } from "./gateway.js";

const retryConfig = { strategy: "none" };
const client = new OpenRouter({ apiKey: KEY, serverURL: URL_BASE, retryConfig, timeoutMs: 20_000 });
const manager = new OpenRouter({ apiKey: MANAGEMENT_KEY, serverURL: URL_BASE, retryConfig, timeoutMs: 20_000 });
const TOOLS = [{ type: "function", function: { name: "take_note", parameters: { type: "object" } } }];

test("a whole answer, its generation, and its price off the credits", async () => {
  const before = (await client.credits.getCredits()).data;
  const answer = await client.chat.send({ chatRequest: { model: MODEL, messages: MESSAGES, stream: false } });
  assert.equal(answer.choices[0].message.content, TEXT);
  assert.equal(answer.choices[0].finishReason, "stop");
  const { data } = await soon(() => client.generations.getGeneration({ id: answer.id }));
  assert.equal(data.id, answer.id);
  assert.equal(data.tokensCompletion, answer.usage.completionTokens);
  assert.ok(data.totalCost > 0 && data.totalCost === answer.usage.cost);
  const after = (await client.credits.getCredits()).data;
  assert.ok(after.totalUsage >= before.totalUsage + data.totalCost - 1e-9);
});

test("a stream", async () => {
  const stream = await client.chat.send({ chatRequest: { model: MODEL, messages: MESSAGES, stream: true } });
  const parts = [];
  for await (const part of stream) parts.push(part);
  assert.equal(parts.map((part) => part.choices[0]?.delta?.content ?? "").join(""), TEXT);
  assert.ok(parts.at(-1).usage.totalTokens > 0);
});

test("how an endpoint was chosen, for those who ask", async () => {
  const answer = await client.chat.send({ xOpenRouterMetadata: "enabled", chatRequest: { model: MODEL, messages: MESSAGES, stream: false } });
  assert.ok(answer.openrouterMetadata);
});

test("a tool call and the answer to its result", async () => {
  const asked = await client.chat.send({ chatRequest: { model: TOOL_MODEL, messages: MESSAGES, tools: TOOLS, stream: false } });
  const { message } = asked.choices[0];
  const [call] = message.toolCalls;
  assert.equal(call.function.name, "take_note");
  const messages = [...MESSAGES, message, { role: "tool", toolCallId: call.id, content: "noted" }];
  const answer = await client.chat.send({ chatRequest: { model: MODEL, messages, tools: TOOLS, stream: false } });
  assert.equal(answer.choices[0].message.content, TEXT);
});

test("the catalog: models, counts, endpoints, providers", async () => {
  const ids = [];
  for await (const page of await client.models.list()) ids.push(...page.result.data.map((model) => model.id));
  assert.deepEqual(ids.sort(), [MODEL, TOOL_MODEL]);
  assert.equal((await client.models.count()).data.count, 2);
  const [author, slug] = MODEL.split("/");
  assert.equal((await client.models.get({ author, slug })).data.id, MODEL);
  const { endpoints } = (await client.endpoints.list({ author, slug })).data;
  assert.deepEqual(endpoints.map((endpoint) => endpoint.providerName), ["North"]);
  assert.deepEqual((await client.providers.list()).data.map((provider) => provider.slug), ["north"]);
  assert.ok(Array.isArray((await client.endpoints.listZdrEndpoints()).data));
});

test("models that the account may use", async () => {
  const ids = [];
  for await (const page of await client.models.listForUser({ bearer: KEY })) ids.push(...page.result.data.map((model) => model.id));
  assert.deepEqual(ids.sort(), [MODEL, TOOL_MODEL]);
});

test("the calling key", async () => {
  const { data } = await client.apiKeys.getCurrentKeyMetadata();
  assert.ok(data.label.startsWith("sk-or-v1-") && !data.isManagementKey && data.limit === null);
  assert.ok((await manager.apiKeys.getCurrentKeyMetadata()).data.isManagementKey);
});

test("keys are made, read, listed, changed and removed with a management key", async () => {
  const made = await manager.apiKeys.create({ requestBody: { name: "from node", limit: 1.5, limitReset: "monthly" } });
  const { hash } = made.data;
  assert.equal(createHash("sha256").update(made.key).digest("hex"), hash);
  const fresh = new OpenRouter({ apiKey: made.key, serverURL: URL_BASE, retryConfig });
  const answer = await fresh.chat.send({ chatRequest: { model: MODEL, messages: MESSAGES, stream: false } });
  assert.equal(answer.choices[0].message.content, TEXT);
  assert.equal((await manager.apiKeys.get({ hash })).data.name, "from node");
  assert.ok((await manager.apiKeys.list()).data.some((key) => key.hash === hash));
  const changed = (await manager.apiKeys.update({ hash, requestBody: { name: "renamed", disabled: true, limit: null } })).data;
  assert.deepEqual([changed.name, changed.disabled, changed.limit], ["renamed", true, null]);
  await assert.rejects(fresh.chat.send({ chatRequest: { model: MODEL, messages: MESSAGES } }), errors.UnauthorizedResponseError);
  assert.equal((await manager.apiKeys.delete({ hash })).deleted, true);
  await assert.rejects(manager.apiKeys.get({ hash }), errors.NotFoundResponseError);
});

test("activity", async () => {
  assert.deepEqual((await manager.analytics.getUserActivity()).data, []); // of today, which is not over
});

test("a consent becomes a key", async () => {
  const verifier = randomBytes(32).toString("base64url");
  const challenge = createHash("sha256").update(verifier).digest("base64url");
  const code = await manager.oAuth.createAuthCode({
    requestBody: { callbackUrl: "https://app.example/back", codeChallenge: challenge, codeChallengeMethod: "S256", limit: 1 },
  });
  const taken = await client.oAuth.exchangeAuthCodeForAPIKey({
    requestBody: { code: code.data.id, codeVerifier: verifier, codeChallengeMethod: "S256" },
  });
  const fresh = new OpenRouter({ apiKey: taken.key, serverURL: URL_BASE, retryConfig });
  assert.equal((await fresh.apiKeys.getCurrentKeyMetadata()).data.limit, 1);
});

test("refusals are the errors of the client", async () => {
  const send = (apiKey, chatRequest) => new OpenRouter({ apiKey, serverURL: URL_BASE, retryConfig }).chat.send({ chatRequest });
  await assert.rejects(send("sk-or-v1-wrong", { model: MODEL, messages: MESSAGES }), errors.UnauthorizedResponseError);
  await assert.rejects(send(KEY, { model: "acme/none", messages: MESSAGES }), errors.BadRequestResponseError);
  await assert.rejects(client.apiKeys.list(), errors.OpenRouterError); // with a key that may not
  await assert.rejects(client.models.get({ author: "acme", slug: "none" }), errors.NotFoundResponseError);
});
