"use strict";
// Normal noise from a counter: the numbers of coalescer_fast.PhiloxGenerator(seed, picture).

// The 64 bits of a * b, two 32-bit words, as [high, low]; products of 16-bit limbs are exact.
function multiply(a, b) {
  const al = a & 0xffff, ah = a >>> 16, bl = b & 0xffff, bh = b >>> 16;
  const middle = ah * bl + ((al * bl) >>> 16), other = al * bh + (middle % 65536);
  return [(ah * bh + Math.floor(middle / 65536) + Math.floor(other / 65536)) >>> 0, Math.imul(a, b) >>> 0];
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
function philox([a, b, c, d], [left, right]) {
  for (let round = 0; round < 10; round++) {
    const [high, low] = multiply(0xd2511f53, a), [other, lower] = multiply(0xcd9e8d57, c);
    [a, b, c, d] = [(other ^ b ^ left) >>> 0, lower, (high ^ d ^ right) >>> 0, low];
    left = (left + 0x9e3779b9) >>> 0;
    right = (right + 0xbb67ae85) >>> 0;
  }
  return [a, b, c, d];
}

// `count` normal numbers of a picture, by Box and Muller's transform. The seed is a BigInt.
function normals(seed, picture, count) {
  const words = (x) => [Number(BigInt(x) & 0xffffffffn), Number(BigInt(x) >> 32n)];
  const key = words(seed), number = words(picture), out = new Float32Array(count);
  for (let i = 0; i < count; i += 4) {
    const v = philox([i / 4, 0, ...number], key).map((x) => (x + 0.5) / 2 ** 32);
    for (let j = 0; j < 4; j += 2) {
      const radius = Math.sqrt(-2 * Math.log(v[j])), angle = 2 * Math.PI * v[j + 1];
      if (i + j < count) out[i + j] = radius * Math.cos(angle);
      if (i + j + 1 < count) out[i + j + 1] = radius * Math.sin(angle);
    }
  }
  return out;
}
