// The page in a headless browser: node examples/web/browser.js FOLDER [PROMPT] [--tokens N] [--browser PATH]
// Prints one JSON object: what was written and how fast, as node/main.js --json does, and any request to elsewhere.
import { readdir, readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import { chromium } from "playwright-core";

import { serve } from "./serve.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: "string", default: "64" },
    browser: { type: "string", default: "/usr/bin/chromium" },
    screenshot: { type: "string" },
  },
});
const [folder, prompt = "The capital of France is"] = positionals;
const LOADING_MS = 300_000;

/** Most memory that one of this browser's processes with this word in its command line ever held; Linux only. */
async function peakMB(word) {
  const found = [];
  for (const id of await readdir("/proc").catch(() => [])) {
    const [command, status] = await Promise.all(
      ["cmdline", "status"].map((name) => readFile(`/proc/${id}/${name}`, "utf8").catch(() => "")),
    );
    const peak = /VmHWM:\s+(\d+)/.exec(status);
    if (command.includes(word) && command.includes(mark) && peak) found.push((Number(peak[1]) * 1024) / 1e6);
  }
  return found.length ? Math.max(...found) : undefined;
}

const server = await serve(folder);
const origin = `http://127.0.0.1:${server.address().port}`;
// A browser hands its user agent on to its processes, which are known by it. No sandbox: it does not start for root in a
// container, and nothing but our own page is loaded.
const mark = `--user-agent=compressor-example-${process.pid}`;
const browser = await chromium.launch({ executablePath: values.browser, args: ["--no-sandbox", mark] });
try {
  const page = await browser.newPage();
  const elsewhere = [];
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(origin) && !/^(blob|data):/.test(url)) elsewhere.push(url);
  });
  page.on("pageerror", (error) => console.error(String(error)));
  page.on("console", (message) => message.type() === "error" && console.error(message.text()));
  await page.goto(origin);
  await page.waitForSelector("body[data-state=ready], body[data-state=failed]", { timeout: LOADING_MS });
  const said = await page.textContent("#status");
  if ((await page.getAttribute("body", "data-state")) === "failed") throw new Error(said);
  await page.fill("#prompt", prompt);
  await page.fill("#count", values.tokens);
  await page.click("#go");
  await page.waitForSelector("#output[data-tokens]", { timeout: LOADING_MS });
  if (values.screenshot) await page.screenshot({ path: values.screenshot });
  const result = await page.evaluate(() => {
    const { dataset, textContent } = document.getElementById("output");
    return {
      text: textContent,
      prompt: JSON.parse(dataset.prompt),
      tokens: JSON.parse(dataset.tokens),
      loadMs: Number(document.body.dataset.loadMs),
      firstTokenMs: Number(dataset.firstTokenMs),
      tokensPerSecond: Number(dataset.tokensPerSecond),
      isolated: crossOriginIsolated,
    };
  });
  console.log(JSON.stringify({ ...result, elsewhere, peakMB: await peakMB("--type=renderer") }));
} finally {
  await browser.close();
  server.close();
}
