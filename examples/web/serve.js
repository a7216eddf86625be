// The page's own server: node examples/web/serve.js FOLDER [--port N]. Serves examples/ and, below /model/, the folder.
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { dirname, extname, join, resolve, sep } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const EXAMPLES = dirname(dirname(fileURLToPath(import.meta.url)));
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".wasm": "application/wasm",
};
// Together these isolate the page, without which a browser gives WebAssembly no threads.
const HEADERS = {
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-embedder-policy": "require-corp",
  "cache-control": "no-cache",
};

/** The file that a URL's path stands for; undefined for one outside what is served. */
export function fileOf(path, folder) {
  const decoded = decodeURIComponent(path);
  const inModel = decoded.startsWith("/model/");
  const root = resolve(inModel ? folder : EXAMPLES);
  const inside = inModel ? decoded.slice("/model/".length) : decoded.replace(/^\/+/, "");
  const file = resolve(root, inside.endsWith("/") || inside === "" ? `${inside}index.html` : inside);
  return file.startsWith(root + sep) ? file : undefined;
}

/** A server of the folder; port 0 takes a free one. Resolves to the server, which listens. */
export async function serve(folder, port = 0) {
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://localhost");
    if (pathname === "/") return response.writeHead(302, { location: "/web/" }).end();
    const file = fileOf(pathname, folder);
    const found = file && (await stat(file).catch(() => undefined));
    if (!found?.isFile()) return response.writeHead(404, HEADERS).end();
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(200, { ...HEADERS, "content-type": type, "content-length": found.size });
    createReadStream(file).pipe(response);
  });
  await new Promise((ready, failed) => server.once("error", failed).listen(port, "127.0.0.1", ready));
  return server;
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { port: { type: "string", default: "8000" } },
  });
  const [folder] = positionals;
  if (!folder || !(await stat(join(folder, "model.onnx")).catch(() => false))) {
    console.error("usage: node examples/web/serve.js FOLDER [--port N]   (FOLDER: what compress wrote, with model.onnx)");
    process.exit(2);
  }
  const server = await serve(folder, Number(values.port));
  console.log(`http://127.0.0.1:${server.address().port}/`);
}
