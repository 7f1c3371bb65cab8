"use strict";
// The page: draws what is typed. drawer.js, which is loaded before, says how a picture is drawn: it sets `drawer` with
//
//   drawer.open(report) -> {model, size, styles, where}: called once; report(text, fraction) tells how far it has come.
//       Where there are limits, `most` pictures at a time and the `longest` prompt, too
//   drawer.draw({prompt, seed, first, n, steps}, show, signal): pictures first ... first + n - 1 of a seed (in decimal),
//       show({picture, pixels, drawn, matched, quality, steps, warnings, receipt}) as each is there. `pixels` is RGBA,
//       `steps` what R, R after one step and after two decode to, null unless asked for. After `signal` has aborted, what
//       has not begun is not drawn.

const VARIATIONS = 8;
const PAUSE = 150; // ms after the last picture until what stands beside it is drawn
const LARGEST_SEED = 2n ** 64n - 1n;
const $ = (id) => document.getElementById(id);

let info = null; // what drawer.open has told
let cells = []; // of the grid: {prompt(), first, canvas, input}
let main = null; // what the large canvas shows, with its prompt and seed
let isDrawing = false, isStale = false, pause = 0;
let beside = new AbortController(); // of the steps and the grid

const view = () => document.querySelector("input[name=view]:checked").value;
const seed = () => $("seed").value.trim();
const isSeed = (text) => /^\d{1,20}$/.test(text) && BigInt(text) <= LARGEST_SEED;
const chosen = () => Math.max(0, cells.findIndex((cell) => cell.input.checked));

function unstyled(prompt) {
  const words = info.styles.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/i/gi, "[iıİ]")).join("|"); // as in Python
  const styles = new RegExp(`[\\s,;]*(?<![\\p{L}\\p{N}_])(${words}) style(?![\\p{L}\\p{N}_])`, "giu");
  return words ? prompt.replace(styles, "") : prompt;
}

function layOut() {
  const styled = view() === "styles";
  const count = view() === "seeds" ? Math.min(VARIATIONS, info.most ?? VARIATIONS) : 1;
  const names = styled ? info.styles : Array.from({length: count}, (_, i) => `${i + 1}`);
  $("grid").hidden = view() === "one";
  $("grid-name").textContent = styled ? "Styles" : "Variations";
  cells = names.map((name, i) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const canvas = document.createElement("canvas"), caption = document.createElement("span");
    Object.assign(input, {type: "radio", name: "cell", checked: i === 0});
    input.setAttribute("aria-label", styled ? `${name} style` : `variation ${name}`);
    input.addEventListener("change", change);
    canvas.width = canvas.height = info.size;
    canvas.setAttribute("aria-hidden", "true");
    caption.textContent = name;
    label.append(input, canvas, caption);
    const text = () => $("prompt").value;
    const withStyle = () => [unstyled(text()).trim(), `${name} style`].filter(Boolean).join(", ");
    return {label, input, canvas, prompt: styled ? withStyle : text, first: styled ? 0 : i};
  });
  $("cells").replaceChildren(...cells.map((cell) => cell.label));
}

// What is no character, half of a pair, is drawn and saved as U+FFFD.
const request = (cell, steps = false) => {
  const prompt = cell.prompt().replace(/\p{Surrogate}/gu, "\ufffd");
  return {prompt, seed: seed(), first: cell.first, n: 1, steps};
};

function paint(canvas, pixels) {
  canvas.width = canvas.height = info.size;
  canvas.getContext("2d").putImageData(new ImageData(pixels, info.size, info.size), 0, 0);
}

function showMain(asked, picture) {
  main = {...picture, prompt: asked.prompt, seed: asked.seed};
  const {matched, quality} = picture;
  paint($("picture"), picture.pixels);
  $("picture").setAttribute("aria-label", `Picture of ${picture.drawn || "anything"}`);
  $("matched").textContent = matched ? `${matched.name} (similarity ${matched.similarity.toFixed(2)})` : "as it stands";
  $("drawn").textContent = picture.drawn || "anything";
  $("quality").value = quality ?? 0;
  $("quality").hidden = quality === null;
  $("percent").textContent = quality === null ? "not known" : `${Math.round(100 * quality)} %`;
  $("warnings").replaceChildren(...picture.warnings.map((text) => Object.assign(document.createElement("li"), {textContent: text})));
  $("warnings").hidden = !picture.warnings.length;
  picture.steps?.forEach((pixels, i) => paint($("steps").querySelectorAll("canvas")[i], pixels));
  $("save").disabled = false;
  $("error").hidden = true;
}

function complain(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

// Draws the chosen picture at once. While one is being drawn, keys only mark it as stale, so that the picture of the last
// key comes after the one in work and no queue builds up.
async function change() {
  beside.abort();
  clearTimeout(pause);
  const valid = isSeed(seed());
  $("seed-error").hidden = valid;
  $("seed").setAttribute("aria-invalid", String(!valid));
  if (info === null || !valid) return;
  isStale = true;
  if (isDrawing) return;
  isDrawing = true;
  try {
    while (isStale && isSeed(seed())) {
      isStale = false;
      const cell = cells[chosen()], asked = request(cell);
      await drawer.draw(asked, (picture) => { showMain(asked, picture); paint(cell.canvas, picture.pixels); });
    }
    if (isSeed(seed())) pause = setTimeout(settle, PAUSE);
  } catch (error) {
    complain(error);
  } finally {
    isDrawing = false;
  }
}

// Draws what stands beside the picture: its steps, and the other cells of the grid.
async function settle() {
  const {signal} = beside = new AbortController(), cell = cells[chosen()], asked = request(cell, true);
  const others = cells.filter((each) => each !== cell);
  try {
    await drawer.draw(asked, (picture) => signal.aborted || showMain(asked, picture), signal);
    if (signal.aborted) return;
    const quality = main.quality === null ? "" : `, chance ${$("percent").textContent}`;
    $("announcement").textContent = [`Drawn: ${main.drawn || "anything"}${quality}`, ...main.warnings].join(". ");
    if (view() === "seeds") { // one request for all
      const show = (picture) => signal.aborted || paint(cells[picture.picture].canvas, picture.pixels);
      await drawer.draw({...request(cells[0]), n: cells.length}, show, signal);
    } else {
      const draw = (other) => drawer.draw(request(other), (picture) => signal.aborted || paint(other.canvas, picture.pixels), signal);
      await Promise.all(others.map(draw));
    }
  } catch (error) {
    if (!signal.aborted) complain(error);
  }
}

// A PNG of RGBA pixels, with texts as iTXt chunks.
async function png(side, pixels, texts) {
  const rows = new Uint8Array(side * (1 + 3 * side));
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++)
      for (let k = 0; k < 3; k++) rows[y * (1 + 3 * side) + 1 + 3 * x + k] = pixels[4 * (y * side + x) + k];
  const deflated = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
  const chunk = (name, ...parts) => {
    const body = parts.flatMap((part) => [...part]), bytes = new Uint8Array(12 + body.length), fields = new DataView(bytes.buffer);
    fields.setUint32(0, body.length);
    bytes.set(new TextEncoder().encode(name), 4);
    bytes.set(body, 8);
    fields.setUint32(8 + body.length, crc32(bytes.subarray(4, 8 + body.length)));
    return bytes;
  };
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, side);
  header.setUint32(4, side);
  header.setUint16(8, 0x0802); // 8 bits, RGB
  const utf8 = (text) => new TextEncoder().encode(text);
  const said = Object.entries(texts).map(([name, text]) => chunk("iTXt", utf8(name), [0, 0, 0, 0, 0], utf8(text)));
  const signature = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  return new Blob([signature, chunk("IHDR", new Uint8Array(header.buffer)), ...said, chunk("IDAT", new Uint8Array(deflated)), chunk("IEND")], {type: "image/png"});
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let k = 0; k < 8; k++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}

// SHA-256 of the picture as 8-bit RGB, as in a receipt; null where a browser offers no hashes (http on another machine).
async function pixelHash(pixels) {
  if (!globalThis.crypto?.subtle) return null;
  const rgb = pixels.filter((_, i) => i % 4 !== 3);
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new Uint8Array(rgb)));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function asPNG(shown) {
  const receipt = {...shown.receipt, prompts: [shown.prompt], pixels: await pixelHash(shown.pixels)};
  const texts = {prompt: shown.prompt, drawn: shown.drawn, seed: shown.seed, picture: `${shown.picture}`};
  return png(info.size, shown.pixels, {...texts, receipt: JSON.stringify(receipt)});
}

async function save() {
  const shown = main, link = document.createElement("a");
  const words = shown.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  link.href = URL.createObjectURL(await asPNG(shown));
  const name = Array.from(words).slice(0, 60).join("").replace(/^-|-$/g, "");
  link.download = `${name || "picture"}-${shown.seed}-${shown.picture}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function newSeed(event) {
  event.preventDefault();
  $("seed").value = `${crypto.getRandomValues(new Uint32Array(1))[0]}`;
  change();
}

async function start() {
  $("form").addEventListener("submit", newSeed);
  $("prompt").addEventListener("input", change);
  $("seed").addEventListener("input", change);
  $("save").addEventListener("click", () => save().catch(complain));
  $("prompt").select(); // so that typing replaces the example
  try {
    info = await drawer.open((text, fraction) => {
      $("loading-text").textContent = text;
      if (fraction === undefined) $("progress").removeAttribute("value");
      else $("progress").value = fraction;
    });
    for (const input of document.querySelectorAll("input[name=view]"))
      input.addEventListener("change", () => { layOut(); change(); });
    if (info.longest !== undefined) $("prompt").maxLength = info.longest;
    $("styles-choice").hidden = !info.styles.length;
    $("where").textContent = info.where;
    layOut();
    await change();
  } catch (error) {
    complain(error);
  } finally {
    $("loading").hidden = true;
  }
}

start();
