"use strict";
// What coalescer_fast.models.DescriptionEncoder does with a description: the same functions under the same names, with
// tables of characters (export/web/tables.py) in the place of Python's and the tokenizer's own.

const SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
const LONGEST_WORD = 100; // characters; longer ones are unknown
const ENDINGS = new Set(["s", "es", "d", "ed", "r", "er", "ing", "y", "ly", "ish"]);
const SHORTEST = 3;
const NO_WORDS = [0, 0, 0];

// Arrays of a safetensors file, by name.
function readSafetensors(buffer) {
  const kinds = {I8: Int8Array, U8: Uint8Array, F32: Float32Array, I64: BigInt64Array};
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  delete header.__metadata__;
  const read = ({dtype, data_offsets: [from, to]}) => new kinds[dtype](buffer.slice(8 + length + from, 8 + length + to));
  return Object.fromEntries(Object.entries(header).map(([name, entry]) => [name, read(entry)]));
}

// BLAKE2b (RFC 7693) with a digest of 8 bytes, as a signed number, little-endian.
function blake2b8(bytes) {
  const start = [0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
    0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n];
  const orders = ["0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0"]
    .map((digits) => Array.from(digits, (digit) => parseInt(digit, 16)));
  const columns = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];
  const rotate = (x, n) => BigInt.asUintN(64, (x >> n) | (x << (64n - n)));
  const state = [...start];
  state[0] ^= 0x01010008n;
  const blocks = Math.max(1, Math.ceil(bytes.length / 128));
  for (let block = 0; block < blocks; block++) {
    const padded = new DataView(new ArrayBuffer(128)), end = Math.min(bytes.length, 128 * (block + 1));
    bytes.subarray(128 * block, end).forEach((byte, i) => padded.setUint8(i, byte));
    const message = Array.from({length: 16}, (_, i) => padded.getBigUint64(8 * i, true));
    const v = [...state, ...start];
    v[12] ^= BigInt(end);
    if (block === blocks - 1) v[14] ^= 0xffffffffffffffffn;
    for (let round = 0; round < 12; round++)
      columns.forEach(([a, b, c, d], i) => {
        const [x, y] = orders[round % 10].slice(2 * i, 2 * i + 2).map((j) => message[j]);
        v[a] = BigInt.asUintN(64, v[a] + v[b] + x);
        v[d] = rotate(v[d] ^ v[a], 32n);
        v[c] = BigInt.asUintN(64, v[c] + v[d]);
        v[b] = rotate(v[b] ^ v[c], 24n);
        v[a] = BigInt.asUintN(64, v[a] + v[b] + y);
        v[d] = rotate(v[d] ^ v[a], 16n);
        v[c] = BigInt.asUintN(64, v[c] + v[d]);
        v[b] = rotate(v[b] ^ v[c], 63n);
      });
    state.forEach((word, i) => { state[i] = word ^ v[i] ^ v[i + 8]; });
  }
  return BigInt.asIntN(64, state[0]);
}

function* forms(said, article) {
  const bare = said.replace(article, "");
  for (const text of new Set([said, bare])) {
    yield text;
    for (const ending of ["s", "es"]) if (text.endsWith(ending)) yield text.slice(0, -ending.length);
  }
}

const withoutEnding = (word, ending) => (word.endsWith(ending) ? word.slice(0, word.length - ending.length) : word);

// Phi(x), the distribution function of the normal numbers.
function normalDistribution(x) {
  if (Math.abs(x) > 8) return x > 0 ? 1 : 0;
  let term = x, sum = x;
  for (let k = 3; Math.abs(term) > 1e-17; k += 2) sum += term *= (x * x) / k;
  return 0.5 + (sum * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI);
}

class DescriptionEncoder {
  // tensors: of the encoder, as readSafetensors has them; config: its configuration; tables: see tables.py.
  constructor(tensors, config, tables) {
    const lines = (bytes) => (bytes?.length ? new TextDecoder().decode(bytes).split("\n") : []);
    const one = (set) => new RegExp(`^[${set}]$`, "u"), {sets} = tables;
    Object.assign(this, {tensors, config, tables, tokens: lines(tensors.vocab), names: lines(tensors.names)});
    this.vocab = new Map(this.tokens.map((token, i) => [token, i]));
    const special = SPECIAL.filter((token) => this.vocab.has(token));
    this.special = new Set(special.map((token) => this.vocab.get(token)));
    this.specialToken = new RegExp(special.map((token) => token.replace(/[[\]]/g, "\\$&")).join("|") || "(?!)", "g");
    this.is = Object.fromEntries(Object.entries(sets).map(([name, set]) => [name, one(set)]));
    this.longest = new Map();
    for (const emoji of Object.keys(tables.emoji)) {
      const [first, ...rest] = emoji;
      this.longest.set(first, Math.max(this.longest.get(first) ?? 0, 1 + rest.length));
    }
    const styles = config.styles.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&").replace(/i/gi, "[iıİ]")).join("|"); // as re.IGNORECASE
    this.stylePhrase = new RegExp(`(?<![${sets.alphanumeric}_])(${styles}) style(?![${sets.alphanumeric}_])`, "giu");
    const known = this.lower([...this.names, ...config.styles].join("\n"));
    this.nameWords = new Set(known.match(new RegExp(`[${sets.alphanumeric}_]+`, "gu")));
    this.article = new RegExp(tables.article);
    this.nameRows = new Map(this.names.map((name, row) => [this.plain(name), row]).reverse());
    this.nameVectors = this.names.map((name, row) => this.nameVector(name, row));
  }

  // As Python's str.lower.
  lower(text) {
    if (text.includes("Σ")) return text.toLowerCase(); // which knows where a sigma is final
    return Array.from(text, (character) => this.tables.lower[character] ?? character).join("");
  }

  plain(text) {
    const words = Array.from(this.lower(text), (character) => (this.is.space.test(character) ? " " : character)).join("");
    return words.split(" ").filter(Boolean).join(" ").replace(/^[ ,;.!?]+|[ ,;.!?]+$/g, "");
  }

  spell(text) {
    if (/^[\x00-\x7f]*$/.test(text)) return text;
    const plain = Array.from(text).filter((character) => !this.is.modifier.test(character));
    let out = "";
    for (let i = 0; i < plain.length; ) {
      let length = this.longest.get(plain[i]) ?? 0, name;
      for (; length > 0; length--) {
        name = this.tables.emoji[plain.slice(i, i + length).join("")];
        if (name !== undefined) break;
      }
      out += name === undefined ? plain[i] : ` ${name} `;
      i += length || 1;
    }
    return out;
  }

  // What the tokenizer makes of a character: nothing, or one or several, each as it stands or as a space.
  normalized(character) {
    const code = character.codePointAt(0);
    if (code >= 0xac00 && code <= 0xd7a3) { // Hangul syllables are made of their parts
      const [first, rest] = [Math.floor((code - 0xac00) / 588), (code - 0xac00) % 588];
      const parts = [0x1100 + first, 0x1161 + Math.floor(rest / 28)];
      return String.fromCodePoint(...parts, ...(rest % 28 ? [0x11a7 + (rest % 28)] : []));
    }
    if (this.is.removed.test(character)) return "";
    if (this.is.ideograph.test(character)) return ` ${character} `;
    return this.tables.normalized[character] ?? character;
  }

  // Words with their tokens: [{tokens, start, end}], start and end in characters of the text.
  encode(text) {
    const found = [];
    const add = (word) => {
      if (word.length) found.push({tokens: this.pieces(word.map(([part]) => part)), start: word[0][1], end: word.at(-1)[1] + 1});
    };
    let at = 0;
    const plainPart = (part) => {
      let word = [], marks = [];
      const flush = () => { // marks stand in the order of their combining classes
        word.push(...marks.sort(([a], [b]) => this.tables.marks[a] - this.tables.marks[b]));
        marks = [];
      };
      const end = () => { flush(); add(word); word = []; };
      for (const character of part) {
        for (const one of this.normalized(character)) {
          if (this.tables.marks[one] !== undefined) marks.push([one, at]);
          else if (this.is.blank.test(one)) end();
          else if (this.is.punctuation.test(one)) { end(); add([[one, at]]); }
          else { flush(); word.push([one, at]); }
        }
        at++;
      }
      end();
    };
    let from = 0;
    for (const {0: token, index} of text.matchAll(this.specialToken)) { // before anything is normalised
      plainPart(text.slice(from, index));
      found.push({tokens: [token], start: at, end: at += token.length});
      from = index + token.length;
    }
    plainPart(text.slice(from));
    return found;
  }

  // WordPiece: the longest token at each place, or [UNK].
  pieces(word) {
    const found = [];
    if (word.length > LONGEST_WORD) return ["[UNK]"];
    for (let start = 0, end; start < word.length; start = end) {
      const token = (stop) => (start ? "##" : "") + word.slice(start, stop).join("");
      for (end = word.length; end > start && !this.vocab.has(token(end)); end--);
      if (end === start) return ["[UNK]"];
      found.push(token(end));
    }
    return found;
  }

  encodeSpelled(text) {
    return this.encode(this.spell(text).replace(/[,;]/g, " "));
  }

  tokenIds(text) {
    const ids = this.encodeSpelled(text).flatMap(({tokens}) => tokens).map((token) => this.vocab.get(token));
    return ids.filter((id) => id !== undefined && !this.special.has(id));
  }

  // The words of a description, and whether each is known: a Map.
  words(text) {
    const found = this.wordsOfTable(text);
    if (this.lookUp(this.plain(this.split(this.spell(text))[0])) !== null)
      for (const word of found.keys()) found.set(word, true);
    return found;
  }

  // The same, without what the lexicon knows.
  wordsOfTable(text) {
    const spelled = Array.from(this.spell(text)), found = new Map();
    for (const {tokens, start, end} of this.encodeSpelled(text)) {
      if (tokens[0] !== "[UNK]" && this.special.has(this.vocab.get(tokens[0]))) continue;
      const name = this.lower(spelled.slice(start, end).join("")), characters = Array.from(name);
      const isSymbol = tokens.length === 1 && tokens[0] === "[UNK]" && this.is.symbol.test(characters[0]);
      if (!found.has(name) && (isSymbol || characters.some((character) => this.is.alphanumeric.test(character))))
        found.set(name, this.knows(name, tokens));
    }
    return found;
  }

  knows(word, tokens) {
    if (["", "s", "es"].some((ending) => this.nameWords.has(withoutEnding(word, ending)))) return true;
    const [first, ...rest] = tokens.map((token) => token.replace(/^##/, ""));
    if (!rest.length) {
      const characters = Array.from(first);
      return first !== "[UNK]" && (characters.length > 1 || "ai".includes(first) || first > "\x7f" || this.is.decimal.test(first));
    }
    return this.isWord(first) && rest.every((part) => this.isWord(part) || ENDINGS.has(part));
  }

  isWord(text) {
    return Array.from(text).length >= SHORTEST && this.vocab.has(text);
  }

  // The description vector: RMS 1, or 0 without a known token.
  vector(text) {
    const total = this.rows(this.tokenIds(text), "table", "scale", this.config.dim);
    const rms = Math.sqrt(total.reduce((sum, x) => sum + x * x, 0) / total.length);
    return total.map((x) => x / Math.max(rms, 1e-6));
  }

  rows(ids, table, scale, dim) {
    const rows = this.tensors[table], scales = this.tensors[scale], total = new Float32Array(dim);
    for (const id of ids) for (let k = 0; k < dim; k++) total[k] += Math.fround(rows[id * dim + k] * scales[k]);
    return total;
  }

  // What is compared with the vectors of the names, of length 1.
  matchVector(ids) {
    const {match_dim: dim, dim: own} = this.config;
    const total = dim ? this.rows(ids, "match_table", "match_scale", dim) : this.rows(ids, "table", "scale", own);
    return normalize(total);
  }

  nameVector(name, row) {
    const dim = this.config.match_dim;
    if (!dim) return this.matchVector(this.tokenIds(name));
    return normalize(Float32Array.from(this.tensors.match_names.subarray(row * dim, (row + 1) * dim)));
  }

  cosines(text) {
    const ids = this.tokenIds(text);
    if (!ids.length) return null;
    const said = this.matchVector(ids);
    return this.nameVectors.map((vector) => vector.reduce((sum, x, k) => sum + x * said[k], 0));
  }

  // A description without its art styles, and the style words.
  split(description) {
    if (!this.config.styles.length) return [description, []];
    const styles = Array.from(description.matchAll(this.stylePhrase), ([, word]) => this.lower(word));
    return [description.replace(this.stylePhrase, ""), styles];
  }

  // The entry of the lexicon, {name, similarity}, or null.
  lookUp(said) {
    const {lexicon_keys: keys, lexicon_values: values} = this.tensors;
    if (!this.config.lexicon_size) return null;
    for (const form of forms(said, this.article)) {
      const key = blake2b8(new TextEncoder().encode(form));
      let low = 0, high = keys.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (keys[middle] < key) low = middle + 1;
        else high = middle;
      }
      if (keys[low] === key) return {name: values[3 * low] + 256 * values[3 * low + 1], similarity: values[3 * low + 2] / 255};
    }
    return null;
  }

  // The known name that says what a description says, {name, similarity, description}, or null.
  match(description) {
    if (!this.names.length) return null;
    const [text, styles] = this.split(description), said = this.plain(this.spell(text)), row = this.nameRows.get(said);
    if (row !== undefined) return {name: this.names[row], similarity: 1, description};
    let entry = this.lookUp(said);
    if (entry === null) {
      const cosines = this.cosines(text);
      if (cosines === null) return null;
      const best = cosines.reduce((top, cosine, i) => (cosine > cosines[top] ? i : top), 0);
      entry = {name: best, similarity: Math.min(1, cosines[best])};
    }
    const name = this.names[entry.name];
    return {name, similarity: entry.similarity, description: [name, ...styles.map((word) => `${word} style`)].join(", ")};
  }

  closeness(description) {
    const match = this.match(description);
    let text = this.split(description)[0];
    if (match && this.lookUp(this.plain(this.spell(text))) !== null && ![...this.wordsOfTable(text).values()].some(Boolean))
      text = match.name;  // the table knows nothing of it
    const cosines = match && this.cosines(text);
    if (!cosines) return [0, 0];
    const row = this.nameRows.get(this.plain(match.name)), others = cosines.filter((_, i) => i !== row);
    return [cosines[row], others.length ? cosines[row] - Math.max(...others) : 0];
  }

  stylesOf(description) {
    const {styles} = this.config, match = this.match(description);
    if (match === null) return styles;
    const row = this.nameRows.get(this.plain(match.name)) * styles.length;
    const found = styles.filter((_, i) => this.tensors.name_styles[row + i]);
    return found.length ? found : styles;
  }

  // A description with an art style, chosen by u from 0 up to 1, unless it names one.
  withStyle(text, u) {
    if (!this.config.styles.length || !this.tokenIds(text).length || this.split(text)[1].length) return text;
    const styles = this.stylesOf(text);
    return `${text}, ${styles[Math.min(Math.floor(u * styles.length), styles.length - 1)]} style`;
  }

  // What the grade takes of a description, see coalescer_fast.grading.
  ofWords(text) {
    const match = this.match(text);
    return match && [...this.words(text).values()].some(Boolean) ? [match.similarity, ...this.closeness(text)] : NO_WORDS;
  }

  // Sentences about words that are not known.
  warnings(text) {
    const words = [...this.words(text)], unknown = words.filter(([, known]) => !known).map(([word]) => `“\u2068${word}\u2069”`); // in its own direction
    if (text.replace(/^[ ,;\t\r\n]+/, "") && unknown.length === words.length)
      return ["no word of this is known, and what is drawn is anything: use other words"];
    if (!unknown.length) return [];
    const listed = unknown.slice(0, 10).join(", ") + (unknown.length > 10 ? ", ..." : "");
    return [`unknown words, which count for nothing: ${listed}`];
  }
}

function normalize(vector) {
  const length = Math.max(Math.sqrt(vector.reduce((sum, x) => sum + x * x, 0)), 1e-12);
  return vector.map((x) => x / length);
}
