"use strict";
// Runs in a worker, after onnxruntime-web and the functions of noise.js, text.js and sampling.js.

let networks, encoder, settings, isWorking = false;
let jobs = []; // {id, prompt, seed, picture, steps}, to be drawn in turn
const messages = new MessageChannel(); // a turn of the event loop, in which a message to this worker is read

async function open({files, config}) {
  for (const [name, file] of Object.entries(files)) if (file.text !== undefined) files[name] = await unpack(file);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = files.wasm;
  ort.env.wasm.wasmPaths = {mjs: URL.createObjectURL(new Blob([files.glue], {type: "text/javascript"}))};
  const options = {executionProviders: ["wasm"], graphOptimizationLevel: config.optimization};
  const unet = await ort.InferenceSession.create(files.unet, options);
  const decoder = await ort.InferenceSession.create(files.decoder, options);
  settings = config;
  const [channels, height, width] = config.shape;
  networks = {
    async unet(latents, descriptions) {
      const n = descriptions.length, samples = new Float32Array(n * latents.length), dim = descriptions[0].length;
      const described = new Float32Array(n * dim);
      descriptions.forEach((one, i) => { samples.set(latents, i * latents.length); described.set(one, i * dim); });
      const {direction, distance} = await unet.run({
        sample: new ort.Tensor("float32", samples, [n, channels, height, width]),
        description: new ort.Tensor("float32", described, [n, dim]),
      });
      const part = (i) => direction.data.slice(i * latents.length, (i + 1) * latents.length);
      return descriptions.map((_, i) => ({direction: part(i), distance: distance.data[i]}));
    },
    async decode(latents) {
      const {picture} = await decoder.run({latents: new ort.Tensor("float32", latents, [1, channels, height, width])});
      const values = picture.data, count = values.length / 3, pixels = new Uint8ClampedArray(4 * count);
      for (let p = 0; p < count; p++) {
        for (let k = 0; k < 3; k++) pixels[4 * p + k] = (values[k * count + p] / 2 + 0.5) * 255;
        pixels[4 * p + 3] = 255;
      }
      return pixels;
    },
  };
  encoder = new DescriptionEncoder(readSafetensors(files.encoder), config.model, JSON.parse(new TextDecoder().decode(files.tables)));
  await draw(networks, encoder, settings, {prompt: "", seed: 0, picture: 0, steps: false}); // the first run is slow
}

async function work() {
  isWorking = true;
  while (jobs.length) {
    const {id, ...job} = jobs.shift();
    try {
      postMessage({id, drawn: await draw(networks, encoder, settings, job)});
    } catch (error) {
      postMessage({id, error: error.message});
    }
    await new Promise((resume) => { messages.port1.onmessage = resume; messages.port2.postMessage(null); });
  }
  isWorking = false;
}

onmessage = async ({data}) => {
  if (data.open) {
    try {
      await open(data.open);
      postMessage({opened: true});
    } catch (error) {
      postMessage({failed: error.message});
    }
  } else if (data.drop !== undefined) {
    jobs = jobs.filter((job) => job.id !== data.drop);
  } else {
    jobs.push(...data.jobs);
    if (!isWorking) work();
  }
};
