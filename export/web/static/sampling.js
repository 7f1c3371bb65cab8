"use strict";
// From noise to a picture: coalescer_fast.sampling, with the scheduler's settings. `networks` evaluates:
//   networks.unet(R, descriptions) -> [{direction, distance}] at one R for each description; networks.decode(latents) -> pixels

const norm = (x) => Math.sqrt(x.reduce((sum, each) => sum + each * each, 0) / x.length);

// Runs the steps. Returns R before the first and after each of them, and [|direction|, distance] of each evaluation.
async function sample(networks, scheduler, start, description, empty) {
  const {etas, modes, eps, guidance_scale: scale, guided_steps: which} = scheduler, latents = [start], heads = [];
  for (const [i, eta] of etas.entries()) {
    const guided = scale !== 1 && (which === "all" || i === etas.length - 1);
    const [{direction, distance}, away] = await networks.unet(latents[i], guided ? [description, empty] : [description]);
    heads.push([norm(direction), distance]);
    let towards = direction;
    if (guided) {
      const ratio = away.distance / Math.max(distance, 1e-6);
      towards = direction.map((x, k) => x + (scale - 1) * (x - ratio * away.direction[k]));
    }
    const length = (eta * distance) / (modes[i] === "unit" ? Math.max(norm(towards), eps) : 1);
    latents.push(latents[i].map((x, k) => x + length * towards[k]));
  }
  return {latents, heads};
}

// The estimated chance that a picture shows what was asked; null for a model without a grading.
function quality(grading, heads, encoder, prompt) {
  if (!grading) return null;
  if (!encoder.words(prompt).size) return 1; // any picture shows ""
  const [bias, ...weights] = grading[Math.min(2, heads.length)];
  const features = [...heads.slice(0, 2).flat(), ...encoder.ofWords(prompt)];
  return 1 / (1 + Math.exp(-features.reduce((sum, x, k) => sum + weights[k] * x, bias)));
}

// Draws one picture as pipe(prompt, generator=PhiloxGenerator(seed, picture)) does.
async function draw(networks, encoder, settings, {prompt, seed, picture, steps}) {
  const {shape, scheduler} = settings, start = normals(BigInt(seed), picture, shape.reduce((a, b) => a * b));
  const matched = encoder.config.match_dim ? encoder.match(prompt) : null;
  const uniform = normalDistribution((start.reduce((sum, x) => sum + x, 0) / start.length) * Math.sqrt(start.length));
  const drawn = encoder.withStyle(matched?.description ?? prompt, Math.min(Math.max(uniform, 0), 1 - 1e-9));
  const {latents, heads} = await sample(networks, scheduler, start, encoder.vector(drawn), encoder.vector(""));
  const decoded = [];
  for (const each of steps ? [latents[0], latents[1], latents.at(-1)] : [latents.at(-1)]) decoded.push(await networks.decode(each));
  return {
    picture, pixels: decoded.at(-1), drawn, matched: matched && {name: matched.name, similarity: matched.similarity},
    quality: quality(scheduler.grading, heads, encoder, prompt), steps: steps ? decoded : null,
    warnings: encoder.warnings(prompt), heads,
  };
}
