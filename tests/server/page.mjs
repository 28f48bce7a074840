// Runs the script of page.html without a browser: node page.mjs page.html
// Asks, begins a new conversation while the answer comes, asks again; prints the messages of each request as JSON.
import fs from "fs";

const script = fs.readFileSync(process.argv[2], "utf8").split('"use strict";')[1].split("</script>")[0];
const made = {}, asked = [];
const element = () => ({
  value: "", textContent: "", style: {}, handlers: {}, checked: true,
  addEventListener(kind, handler) { this.handlers[kind] = handler; },
  append() {}, replaceChildren() {}, scrollIntoView() {}, requestSubmit() {},
});
const document = {hidden: true, createElement: element, getElementById: id => made[id] ??= element()};
const bytes = text => new TextEncoder().encode(text);

async function fetch(path, options) {
  if (path === "metrics") return {text: async () => ""};
  if (path === "v1/models") return {status: 200, json: async () => ({data: [{id: "m"}]})};
  asked.push(JSON.parse(options.body).messages);
  const body = new ReadableStream({start(stream) {
    stream.enqueue(bytes('data: {"choices": [{"delta": {"content": "OLD"}}]}\n\n'));
    options.signal.addEventListener("abort", () => stream.error(new DOMException("aborted", "AbortError")));
  }});
  return {ok: true, status: 200, body};
}

const pause = () => new Promise(done => setTimeout(done, 30));
async function ask(text) {
  made.prompt.value = text;
  made.form.handlers.submit({preventDefault() {}});
  await pause();
}

new Function("document", "fetch", "setInterval", script)(document, fetch, () => 0);
await pause();
await ask("first");
made.reset.handlers.click();
await pause();
await ask("second");
made.form.handlers.submit({preventDefault() {}});  // stop: what came is history
await pause();
await ask("third");
console.log(JSON.stringify(asked));
process.exit(0);
