"use strict";
// Draws in this browser: a worker runs the networks by onnxruntime-web. The files are beside the page or, packed, in it.

const drawer = {
  async open(report) {
    for (const name of ["Worker", "WebAssembly", "DecompressionStream", "CompressionStream"]) // the last is for saving
      if (!(name in globalThis)) throw new Error(unusable(`it has no ${name}`));
    const config = JSON.parse(await readText("config.json"));
    const sizes = Object.values(config.files).reduce((a, b) => a + b);
    let done = 0;
    const step = (text, bytes) => report(text, (done += bytes) / sizes);
    const file = async (name) => {
      const content = await read(name);
      step("Loading the model", config.files[name]);
      return content;
    };
    const glue = await readText("ort-wasm-simd-threaded.mjs"), runtime = await readText("ort.wasm.min.js");
    const sources = [runtime, "\n", unpack.toString(), "\n", await readText("worker.js")];
    this.worker = new Worker(URL.createObjectURL(new Blob(sources, {type: "text/javascript"})));
    const opened = new Promise((resolve, reject) => { // listens at once: a refused worker says so before the files are there
      this.worker.onmessage = ({data}) => (data.failed ? reject(new Error(unusable(data.failed))) : resolve());
      this.worker.onerror = ({message}) => reject(new Error(message ? unusable(message) : REFUSED));
    });
    opened.catch(() => {}); // it is awaited below
    const names = {wasm: "ort-wasm-simd-threaded.wasm", unet: "unet.onnx", decoder: "decoder.onnx", encoder: "encoder.safetensors"};
    const files = {glue, tables: await read("tables.json")};
    for (const [key, name] of Object.entries(names)) files[key] = await file(name);
    report("Starting the model", undefined);
    this.worker.postMessage({open: {files, config}}, Object.values(files).filter((each) => each instanceof ArrayBuffer));
    await opened;
    this.calls = new Map();
    this.worker.onmessage = ({data}) => this.calls.get(data.id)?.(data);
    this.receipt = config.receipt;
    const where = `Drawn by ${config.receipt.model} in this browser. Nothing that you type leaves it.`;
    return {model: config.receipt.model, size: config.size, styles: config.model.styles, where};
  },

  draw({prompt, seed, first, n, steps}, show, signal) {
    const id = this.number = (this.number ?? 0) + 1;
    return new Promise((resolve, reject) => {
      let left = n;
      const end = (settle, value) => { this.calls.delete(id); settle(value); };
      this.calls.set(id, ({drawn, error}) => {
        if (error !== undefined) return end(reject, new Error(`The picture cannot be drawn (${error}): load the page again.`));
        show({...drawn, receipt: this.receipt});
        if (--left === 0) end(resolve);
      });
      signal?.addEventListener("abort", () => { this.worker.postMessage({drop: id}); end(resolve); });
      const jobs = Array.from({length: n}, (_, i) => ({id, prompt, seed, picture: first + i, steps}));
      this.worker.postMessage({jobs});
    });
  },
};

const REFUSED = "The worker that draws was refused: let the server's Content-Security-Policy allow what the documentation of coalescer-export web lists.";
const unusable = (reason) => `This browser cannot run the model (${reason}): use a current Chromium, Firefox or Safari.`;

// A file of the site, as an ArrayBuffer or, where it is packed in the page, as what unpack takes.
async function read(name) {
  const element = document.getElementById(`file:${name}`);
  if (element !== null) {
    const packed = {text: element.textContent, length: Number(element.dataset.length), planes: "planes" in element.dataset};
    element.remove();
    return packed;
  }
  let answer;
  try {
    answer = await fetch(name);
  } catch {
    const disk = "no page opened from disk may read the files beside it: run python -m http.server here, or export with --single-file";
    throw new Error(location.protocol === "file:" ? disk : `${name} cannot be loaded: check the connection and load the page again`);
  }
  if (!answer.ok) throw new Error(`${name} cannot be loaded (${answer.status}): put all files of the export on the server`);
  return answer.arrayBuffer();
}

async function readText(name) {
  const found = await read(name);
  return new TextDecoder().decode(found instanceof ArrayBuffer ? found : await unpack(found));
}

// The bytes of a packed file: two characters are 13 bits, the bits are gzip's, and of what that holds the first half are the
// even bytes and the second half the odd ones where `planes` says so. See export/web/packing.py.
async function unpack({text, length, planes}) {
  const digit = (i) => { const code = text.charCodeAt(i) - 35; return code > 25 ? code - 1 : code; };
  const packed = new Uint8Array(length);
  let bits = 0, count = 0, at = 0;
  for (let i = 0; i < text.length; i += 2) {
    bits |= (digit(i) + 91 * digit(i + 1)) << count;
    for (count += 13; count >= 8 && at < length; count -= 8) {
      packed[at++] = bits & 255;
      bits >>>= 8;
    }
  }
  const bytes = new Uint8Array(await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  if (!planes) return bytes.buffer;
  const whole = new Uint8Array(bytes.length), half = (bytes.length + 1) >> 1;
  for (let i = 0; i < bytes.length; i++) whole[i] = bytes[(i >> 1) + (i & 1 ? half : 0)];
  return whole.buffer;
}
