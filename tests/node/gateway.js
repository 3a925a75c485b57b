// The gateway that the tests are started with, and what they all ask.

function told(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is missing; run make test-node`);
  return value;
}

export const URL_BASE = told("GATEWAY_URL") + "/api/v1";
export const KEY = told("GATEWAY_KEY");
export const MANAGEMENT_KEY = told("GATEWAY_MANAGEMENT_KEY");
export const MODEL = "acme/sage-1";
export const TOOL_MODEL = "acme/tools-1"; // answers with a call of the first tool
export const MESSAGES = [{ role: "user", content: "Tell me about rivers." }];
export const TEXT = told("GATEWAY_TEXT"); // what MODEL says

/** What `ask` resolves to, once it does: records of an exchange come a moment after it ended. */
export async function soon(ask) {
  const end = Date.now() + 10_000;
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      if (Date.now() > end) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}
