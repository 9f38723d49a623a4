// Decodes z to a picture, layer by layer. layers.py writes the layers, and decodes with them in torch.
'use strict';

const BLOCK = 4; // output channels that are summed at a time; rows of channels are padded to a multiple of it

const padded = (channels) => Math.ceil(channels / BLOCK) * BLOCK;

/** Base64 of little-endian float16 to a Float32Array. */
function halves(base64) {
  const text = atob(base64);
  const table = new Float32Array(1 << 16);
  for (let bits = 0; bits < table.length; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction;
    table[bits] = bits & 0x8000 ? -size : size;
  }
  const values = new Float32Array(text.length / 2);
  for (let i = 0; i < values.length; i++) {
    values[i] = table[text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8)];
  }
  return values;
}

/** Which input pixels reach each output pixel, and through which weight of the kernel. */
function connections(layer, [, height, width]) {
  const { kernel, stride, padding, transposed } = layer;
  const size = (side) =>
    transposed
      ? (side - 1) * stride - 2 * padding + kernel + layer.output_padding
      : Math.floor((side + 2 * padding - kernel) / stride) + 1;
  const source = (out, k) => (transposed ? (out + padding - k) / stride : out * stride - padding + k);
  const within = (at, side) => Number.isInteger(at) && at >= 0 && at < side;
  const [rows, columns] = [size(height), size(width)];
  const [starts, pixels, taps] = [[0], [], []];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      for (let tap = 0; tap < kernel * kernel; tap++) {
        const y = source(row, Math.floor(tap / kernel));
        const x = source(column, tap % kernel);
        if (within(y, height) && within(x, width)) {
          pixels.push(y * width + x);
          taps.push(tap);
        }
      }
      starts.push(pixels.length);
    }
  }
  return {
    rows,
    columns,
    starts: Int32Array.from(starts),
    pixels: Int32Array.from(pixels),
    taps: Int32Array.from(taps),
  };
}

/** A convolution, transposed or not; a linear layer is one of a single pixel. */
function convolution(layer, shape, take) {
  const { channels: out, kernel } = layer;
  const [into] = shape;
  const weights = take(kernel * kernel * into * out); // [kernel, kernel, into, out]
  const bias = new Float32Array(padded(out));
  bias.set(take(out));
  // [out / BLOCK, kernel, kernel, into, BLOCK], in the order of their use
  const blocked = new Float32Array(kernel * kernel * into * padded(out));
  for (let from = 0; from < kernel * kernel * into; from++) {
    for (let channel = 0; channel < out; channel++) {
      const block = Math.floor(channel / BLOCK);
      blocked[(block * kernel * kernel * into + from) * BLOCK + (channel % BLOCK)] =
        weights[from * out + channel];
    }
  }
  const { rows, columns, starts, pixels, taps } = connections(layer, shape);
  const row = padded(into);
  const outRow = padded(out);
  const y = new Float32Array(rows * columns * outRow);
  const run = (x) => {
    for (let first = 0; first < outRow; first += BLOCK) {
      const base = first * kernel * kernel * into;
      for (let pixel = 0; pixel < rows * columns; pixel++) {
        let a = bias[first];
        let b = bias[first + 1];
        let c = bias[first + 2];
        let d = bias[first + 3];
        for (let t = starts[pixel]; t < starts[pixel + 1]; t++) {
          let w = base + taps[t] * into * BLOCK;
          const start = pixels[t] * row;
          for (let i = start; i < start + into; i++, w += BLOCK) {
            const value = x[i];
            a += value * blocked[w];
            b += value * blocked[w + 1];
            c += value * blocked[w + 2];
            d += value * blocked[w + 3];
          }
        }
        const at = pixel * outRow + first;
        y[at] = a;
        y[at + 1] = b;
        y[at + 2] = c;
        y[at + 3] = d;
      }
    }
    return y;
  };
  return { run, shape: [out, rows, columns] };
}

/** The same numbers, in torch's order of channels, rows, columns, in another shape. */
function view(layer, shape) {
  const place = ([channels, height, width], index) => {
    const pixel = index % (height * width);
    return pixel * padded(channels) + Math.floor(index / (height * width));
  };
  const [channels, height, width] = layer.shape;
  const y = new Float32Array(padded(channels) * height * width);
  const run = (x) => {
    for (let i = 0; i < channels * height * width; i++) y[place(layer.shape, i)] = x[place(shape, i)];
    return y;
  };
  return { run, shape: layer.shape };
}

const FUNCTIONS = {
  leaky_relu:
    ({ slope }) =>
    (value) =>
      value < 0 ? slope * value : value,
  sigmoid: () => (value) => 1 / (1 + Math.exp(-value)),
  tanh: () => Math.tanh,
};

function activation(layer, shape) {
  const f = FUNCTIONS[layer.kind](layer);
  const run = (x) => {
    for (let i = 0; i < x.length; i++) x[i] = f(x[i]);
    return x;
  };
  return { run, shape };
}

const BUILDERS = { convolution, view };

/** A model's decoder. `decode` takes z, and returns the picture as [height, width, channels]. */
class Decoder {
  constructor({ latent_dim, layers, weights }) {
    const all = halves(weights);
    let used = 0;
    const take = (count) => all.subarray(used, (used += count));
    this.input = new Float32Array(padded(latent_dim));
    let shape = [latent_dim, 1, 1];
    this.steps = layers.map((layer) => {
      const step = (BUILDERS[layer.kind] || activation)(layer, shape, take);
      shape = step.shape;
      return step.run;
    });
    [this.channels, this.height, this.width] = shape;
  }

  decode(z) {
    this.input.set(z);
    const x = this.steps.reduce((values, run) => run(values), this.input);
    const picture = new Float32Array(this.height * this.width * this.channels);
    for (let i = 0; i < picture.length; i++) {
      picture[i] = x[Math.floor(i / this.channels) * padded(this.channels) + (i % this.channels)];
    }
    return picture;
  }

  /** The picture as RGBA bytes, from values between `low` and 1. */
  paint(z, low) {
    const picture = this.decode(z);
    const bytes = new Uint8ClampedArray(this.height * this.width * 4).fill(255);
    for (let i = 0; i < this.height * this.width; i++) {
      for (let c = 0; c < 3; c++) {
        const value = picture[i * this.channels + (this.channels === 3 ? c : 0)];
        bytes[4 * i + c] = (255 * (value - low)) / (1 - low);
      }
    }
    return bytes;
  }
}

if (typeof WorkerGlobalScope !== 'undefined') {
  let decoder;
  let low;
  onmessage = ({ data }) => {
    if (data.layers) {
      decoder = new Decoder(data);
      low = data.low;
    } else {
      const bytes = decoder.paint(data.z, low);
      postMessage(bytes, [bytes.buffer]);
    }
  };
}
