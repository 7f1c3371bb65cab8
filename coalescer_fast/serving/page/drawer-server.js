"use strict";
// Draws by the server that the page comes from. A token, where the server asks for one, is given as page#token=...

const drawer = {
  async open(report) {
    report("Asking the server", 0);
    const [model] = (await ask("v1/models")).data;
    this.size = model.size ?? 64;
    const limits = {most: model.max_images, longest: model.max_prompt};
    return {...limits, model: model.id, size: this.size, styles: model.styles ?? [], where: `Drawn by ${model.id} on ${location.host}.`};
  },

  async draw({prompt, seed, first, n, steps}, show, signal) {
    const rest = JSON.stringify({prompt, n: first + n, response_format: "b64_json", steps}).slice(1);
    // the seed as it stands: a number of JavaScript holds 53 bits of it
    const answer = await ask("v1/images/generations", {method: "POST", body: `{"seed":${BigInt(seed)},${rest}`, signal});
    for (const [i, one] of answer.data.entries()) {
      if (i < first) continue;
      const [pixels, ...decoded] = await Promise.all([one.b64_json, ...(one.steps ?? [])].map((png) => this.read(png)));
      if (signal?.aborted) return;
      show({
        picture: one.picture ?? i, pixels, drawn: one.revised_prompt ?? prompt, matched: one.matched ?? null,
        quality: one.quality ?? null, steps: decoded.length ? decoded : null, warnings: answer.warnings ?? [],
        receipt: {model: answer.model ?? null, runtime: "coalescer-fast serve", ...one.receipt},
      });
    }
  },

  // The RGBA pixels of a PNG in base64.
  async read(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], {type: "image/png"}));
    const canvas = Object.assign(document.createElement("canvas"), {width: bitmap.width, height: bitmap.height});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  },
};

async function ask(path, options = {}) {
  const [, token] = /^#token=(.+)$/.exec(location.hash)?.map(decodeURIComponent) ?? []; // + and & stand for themselves
  const headers = {"Content-Type": "application/json", ...(token && {Authorization: `Bearer ${token}`})};
  let answer;
  try {
    answer = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: see whether coalescer-fast serve still runs, and type again.");
  }
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.error?.message ?? `The server answers ${answer.status}: see its log.`);
  return said;
}
