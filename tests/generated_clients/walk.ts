// The walk of docs/rest.md with a client that openapi-typescript made from docs/openapi.json.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { argv: string[] };
const [url, key] = process.argv.slice(2) as [string, string];
const client = createClient<paths>({ baseUrl: url, headers: { "x-api-key": key } });

type Event = components["schemas"]["Event"];
type Session = components["schemas"]["Session"];

function there<T>(answer: { data?: T; error?: { error: { message: string } } }): T {
  if (answer.data === undefined) throw new Error(answer.error?.error.message ?? "no answer");
  return answer.data;
}

function described(event: Event): string {
  switch (event.type) {
    case "agent.message":
      return event.content.map((block) => block.text ?? "").join("");
    case "agent.tool_use":
      return `${event.name} ${JSON.stringify(event.input)}`;
    case "user.tool_confirmation":
      return `${event.result} ${event.deny_message ?? ""}`;
    default:
      return event.type;
  }
}

async function rests(id: string, because: "requires_action" | "end_turn"): Promise<Session> {
  const params = { path: { session_id: id } };
  for (;;) {
    const session = there(await client.GET("/v1/sessions/{session_id}", { params }));
    if (session.stop_reason?.type === because) return session;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

async function decide(approval_id: string, body: components["schemas"]["Decide"]): Promise<void> {
  there(await client.POST("/v1/approvals/{approval_id}/decide", { params: { path: { approval_id } }, body }));
}

async function waiting(session_id: string): Promise<string[]> {
  const found = there(await client.GET("/v1/approvals", { params: { query: { session_id } } }));
  return found.data.map((approval) => approval.id).sort();
}

const created = await client.POST("/v1/sessions", {
  body: {
    agent: "default",
    environment_id: "default",
    initial_events: [{ type: "user.message", content: [{ type: "text", text: "Do three things at once" }] }],
  },
});
const { id } = there(created);
await rests(id, "requires_action");
const [first, second, third] = (await waiting(id)) as [string, string, string];
await decide(first, { result: "allow" });
await decide(second, { result: "deny", deny_message: "no dates, please" });
await decide(third, { result: "allow", updated_input: { command: "uname -s > system.txt" } });
await rests(id, "end_turn");
const path = { session_id: id };
const text = "Ask me a question";
there(
  await client.POST("/v1/sessions/{session_id}/events", {
    params: { path },
    body: { events: [{ type: "user.message", content: [{ type: "text", text }] }] },
  }),
);
await rests(id, "requires_action");
const [question] = (await waiting(id)) as [string];
await decide(question, {
  result: "allow",
  answers: { "Which colour should the report have?": "Blue", "Which formats do you need?": ["PDF", "as a slide"] },
});
await rests(id, "end_turn");
const events = there(await client.GET("/v1/sessions/{session_id}/events", { params: { path } })).data;
console.log(events.map(described).join("\n"));
const files = there(await client.GET("/v1/sessions/{session_id}/workspace", { params: { path } })).data;
console.log(`files ${files.map((file) => file.path).sort().join(" ")}`);
