// So many clients, each of which asks for an image, waits for it, and asks again; who is refused comes again later.
import http from "k6/http";
import { check, sleep } from "k6";
import { Counter, Trend } from "k6/metrics";

const drawn = new Trend("drawn_ms", true);
const statuses = new Counter("statuses");
const url = `${__ENV.URL}/v1/images/generations`;
const headers = { "content-type": "application/json" };

export const options = {
  vus: Number(__ENV.CLIENTS),
  duration: `${__ENV.SECONDS}s`,
  summaryTrendStats: ["count", "min", "med", "p(95)", "p(99)", "max"],
  discardResponseBodies: true,
};

export default function () {
  const body = JSON.stringify({ prompt: "a small red circle on a white background", seed: __VU * 100000 + __ITER });
  const answer = http.post(url, body, { headers, timeout: "120s" });
  statuses.add(1, { status: String(answer.status) });
  check(answer, { "200 or 429": (a) => a.status === 200 || a.status === 429 });
  if (answer.status === 200) drawn.add(answer.timings.duration);
  else sleep(answer.status === 429 ? Number(answer.headers["Retry-After"]) : 1);
}

export function handleSummary(data) {
  return { [__ENV.SUMMARY]: JSON.stringify(data) };
}
