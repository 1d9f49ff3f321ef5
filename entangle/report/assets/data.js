// Arrays and tables as `entangle.report.packing` packs them.
const WIDTHS = { u1: 1, u2: 2, u4: 4, i1: 1, f3: 3, f8: 8 };

function bytesOf(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

async function unpack(packed) {
  if (packed.texts) {
    const codes = await unpack(packed.codes);
    return { length: codes.length, codes, texts: packed.texts };
  }
  const stream = new Blob([bytesOf(packed.d)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = packed.n, width = WIDTHS[packed.t];
  if (packed.t === "u1") return planes;
  if (packed.t === "i1") return new Int8Array(planes.buffer);
  if (packed.t === "u2") {
    const out = new Uint16Array(n);
    for (let i = 0; i < n; i++) out[i] = planes[i] | (planes[n + i] << 8);
    return out;
  }
  if (packed.t === "f8") {
    const out = new Float64Array(n), view = new DataView(new ArrayBuffer(8));
    for (let i = 0; i < n; i++) {
      for (let b = 0; b < width; b++) view.setUint8(b, planes[b * n + i]);
      out[i] = view.getFloat64(0, true);
    }
    return out;
  }
  const bits = new Uint32Array(n);
  if (packed.t === "f3") {
    for (let i = 0; i < n; i++) bits[i] = (planes[i] << 8) | (planes[n + i] << 16) | (planes[2 * n + i] << 24);
    return new Float32Array(bits.buffer);
  }
  for (let i = 0; i < n; i++) bits[i] = planes[i] | (planes[n + i] << 8) | (planes[2 * n + i] << 16) | (planes[3 * n + i] << 24);
  return bits;
}

// A table of the rows of every page; unpacked when it is first asked for.
class Table {
  constructor(packed) { this.packed = packed; this.ready = null; }
  load() {
    this.ready ??= (async () => {
      const names = Object.keys(this.packed.columns);
      const [starts, ...columns] = await Promise.all(
        [this.packed.starts, ...names.map((name) => this.packed.columns[name])].map(unpack));
      this.packed = null;
      return { starts, names, columns };
    })();
    return this.ready;
  }
  async rows(page) {
    const { starts, names, columns } = await this.load();
    const found = [];
    for (let i = starts[page]; i < starts[page + 1]; i++) {
      const row = {};
      names.forEach((name, c) => {
        const column = columns[c];
        row[name] = column.texts ? column.texts[column.codes[i]] : column[i];
      });
      found.push(row);
    }
    return found;
  }
}

// Sorting: the places of numbers in order, by their bits (32 at most, 11 at a time); NaN comes last.
function sortedPlaces(values, descending) {
  const n = values.length, keys = new Uint32Array(n);
  const bits = new Uint32Array(new Float32Array(values).buffer);
  for (let i = 0; i < n; i++) {
    if (values[i] !== values[i]) { keys[i] = 0xffffffff; continue; }
    const flip = bits[i] === 0x80000000 ? 0x80000000 : bits[i] & 0x80000000 ? ~bits[i] : bits[i] | 0x80000000;
    keys[i] = descending ? ~flip : flip;
  }
  let from = new Uint32Array(n), to = new Uint32Array(n);
  for (let i = 0; i < n; i++) from[i] = i;
  for (let shift = 0; shift < 33; shift += 11) {
    const counts = new Uint32Array(2049);
    for (let i = 0; i < n; i++) counts[((keys[i] >>> shift) & 2047) + 1]++;
    for (let b = 0; b < 2048; b++) counts[b + 1] += counts[b];
    for (let i = 0; i < n; i++) {
      const place = from[i];
      to[counts[(keys[place] >>> shift) & 2047]++] = place;
    }
    [from, to] = [to, from];
  }
  return from;
}
