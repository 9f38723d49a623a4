// The page: sliders and buttons change z, a worker for each model decodes it.
'use strict';

const LIMIT = 3; // standard deviations of the prior, either way
const STEP = 0.05;
const STRIP = 9; // pictures of a strip, from -LIMIT to LIMIT
const GAP = 2; // pixels between them
const PERIOD = 6000; // milliseconds of a swing

const find = (id) => document.getElementById(id);
const { images, start, models } = JSON.parse(find('data').textContent);

/** An element with properties and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const number = (value) => value.toFixed(2).replace('-', '\u2212');
const say = (text) => (find('status').textContent = text);

/** One model: its picture, its sliders, and the worker that decodes for it. */
class View {
  constructor(model, place, worker) {
    this.model = model;
    this.place = place;
    this.origin = images.length
      ? Float32Array.from(model.codes[start])
      : new Float32Array(model.latent_dim);
    this.z = this.origin.slice();
    this.canvas = make('canvas', { width: model.size, height: model.size, role: 'img' });
    this.canvas.setAttribute('aria-label', `Picture decoded by ${model.name}`);
    this.tiles = []; // canvases of the reconstructions
    this.rows = model.latents.map((latent) => this.makeRow(latent));
    this.held = null; // the row whose strip is shown
    this.wanted = { picture: true, strip: 0, tile: 0 }; // what is still to be decoded
    this.worker = worker;
    this.worker.onerror = () => (find('trouble').hidden = false);
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.postMessage(model);
    model.weights = null; // the worker has its own
    this.pending = null; // what the worker is decoding: where to draw it
    this.show();
  }

  makeRow({ index, kl }) {
    const id = `latent-${this.place}-${index}`;
    const slider = make('input', { type: 'range', min: -LIMIT, max: LIMIT, step: STEP, id });
    const value = make('output', { htmlFor: id });
    const strip = make('div');
    const label = make('label', { htmlFor: id }, `Latent ${index}`);
    if (kl !== null) {
      const bar = make('i');
      bar.style.setProperty('--share', kl / this.model.latents[0].kl);
      label.append(make('small', {}, `${kl.toFixed(2)} nats`), bar);
    }
    const element = make('li', {}, label, slider, value, make('div', { className: 'strip' }, strip));
    const row = { index, slider, value, strip, element, canvas: null };
    slider.addEventListener('focus', () => hold(this, row));
    slider.addEventListener('pointerdown', () => hold(this, row));
    slider.addEventListener('input', () => {
      stop();
      hold(this, row);
      this.set(row, Number(slider.value));
    });
    return row;
  }

  /** The latents' names, sliders and values, under the model's name. */
  list() {
    const { latents, latent_dim: all } = this.model;
    const nats = latents.reduce((sum, { kl }) => sum + kl, 0);
    const known = latents[0].kl !== null;
    const text = known
      ? `${latents.length} of ${all} active, ${nats.toFixed(1)} nats`
      : `${all}, most visible first`;
    const name = models.length > 1 ? this.model.name : 'Latents';
    const section = make('section', { className: 'latents' });
    section.setAttribute('aria-label', `Latents of ${this.model.name}`);
    section.append(make('header', {}, make('h2', {}, name), make('p', {}, text)));
    section.append(make('ol', {}, ...this.rows.map((row) => row.element)));
    return section;
  }

  figure() {
    return make(
      'figure',
      {},
      this.canvas,
      ...(models.length > 1 ? [make('figcaption', {}, this.model.name)] : []),
    );
  }

  /** Change the latent in hand; its strip stays as it is. */
  set(row, value) {
    this.z[row.index] = value;
    this.show();
  }

  /** Go to another z. */
  go(z, isOrigin = true) {
    this.z = Float32Array.from(z);
    if (isOrigin) this.origin = this.z.slice();
    this.wanted.strip = 0;
    this.show();
  }

  show() {
    for (const { index, slider, value } of this.rows) {
      slider.value = this.z[index];
      value.textContent = number(this.z[index]);
      slider.setAttribute('aria-valuetext', number(this.z[index]));
    }
    this.wanted.picture = true;
    this.next();
  }

  hold(row) {
    if (this.held === row) return;
    this.held?.element.classList.remove('held');
    this.held = row;
    if (!row) return;
    if (!row.canvas) {
      const { size } = this.model;
      row.canvas = make('canvas', { width: STRIP * (size + GAP) - GAP, height: size });
      row.canvas.setAttribute('aria-hidden', 'true'); // the slider says the same
      row.canvas.addEventListener('click', (event) => {
        const place = Math.floor((STRIP * event.offsetX) / row.canvas.clientWidth);
        stop();
        this.set(row, at(Math.min(Math.max(place, 0), STRIP - 1)));
      });
      row.strip.append(row.canvas);
    }
    row.element.classList.add('held');
    this.wanted.strip = 0;
    this.next();
  }

  /** Give the idle worker the most urgent z: the newest picture, then the strip, then the reconstructions. */
  next() {
    if (this.pending) return;
    const { wanted, held } = this;
    if (wanted.picture) {
      wanted.picture = false;
      this.decode(this.z, this.canvas, 0);
    } else if (held && wanted.strip < STRIP) {
      const z = this.z.slice();
      z[held.index] = at(wanted.strip);
      this.decode(z, held.canvas, wanted.strip++ * (this.model.size + GAP));
    } else if (wanted.tile < this.tiles.length) {
      this.decode(Float32Array.from(this.model.codes[wanted.tile]), this.tiles[wanted.tile++], 0);
    }
  }

  decode(z, canvas, left) {
    this.pending = { canvas, left };
    this.worker.postMessage({ z });
  }

  receive(bytes) {
    const { canvas, left } = this.pending;
    canvas.getContext('2d').putImageData(new ImageData(bytes, this.model.size), left, 0);
    this.pending = null;
    this.next();
  }
}

const at = (place) => (2 * LIMIT * place) / (STRIP - 1) - LIMIT;

// --- The latent in hand, and its swing ---------------------------------------------------------------------
let inHand; // { view, row }
let frame = null; // of the swing

function hold(view, row) {
  if (inHand?.row === row) return;
  stop();
  if (inHand && inHand.view !== view) inHand.view.hold(null);
  inHand = { view, row };
  view.hold(row);
}

function play() {
  const { view, row } = inHand;
  const begin = Math.asin(Math.min(Math.max(view.z[row.index] / LIMIT, -1), 1));
  let start = null;
  const swing = (time) => {
    start ??= time;
    view.set(row, LIMIT * Math.sin(begin + (2 * Math.PI * (time - start)) / PERIOD));
    frame = requestAnimationFrame(swing);
  };
  frame = requestAnimationFrame(swing);
  find('play').setAttribute('aria-pressed', 'true');
}

function stop() {
  cancelAnimationFrame(frame);
  frame = null;
  find('play').setAttribute('aria-pressed', 'false');
}

// --- Starts ------------------------------------------------------------------------------------------------
/** Mark the tile that all models started from, if any. */
function mark(chosen) {
  for (const [place, tile] of [...document.querySelectorAll('.tiles button')].entries()) {
    tile.setAttribute('aria-pressed', String(place === chosen));
  }
}

function makeTile(source, place) {
  const image = make('img', { src: source, alt: '' });
  const reconstructions = views.map((view) => {
    const canvas = make('canvas', { width: view.model.size, height: view.model.size });
    view.tiles.push(canvas);
    return canvas;
  });
  const tile = make('button', {}, image, ...reconstructions);
  tile.setAttribute('aria-label', `Held-out image ${place + 1} of ${images.length}`);
  tile.addEventListener('click', () => {
    stop();
    views.forEach((view) => view.go(view.model.codes[place]));
    mark(place);
    say(`Started from held-out image ${place + 1}`);
  });
  return tile;
}

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

function sample() {
  const z = Array.from({ length: Math.max(...models.map((model) => model.latent_dim)) }, normal);
  views.forEach((view) => view.go(z.slice(0, view.model.latent_dim)));
  mark(null);
  say('Sampled from the prior');
}

function reset() {
  views.forEach((view) => view.go(view.origin, false));
  say('Back at the start');
}

/** The models' pictures side by side, as a file. */
function save() {
  const { size } = models[0];
  const together = make('canvas', { width: size * views.length, height: size });
  const context = together.getContext('2d');
  views.forEach((view, place) => context.drawImage(view.canvas, place * size, 0));
  together.toBlob((blob) => {
    const link = make('a', {
      href: URL.createObjectURL(blob),
      download: `${models.map((m) => m.name).join('-')}.png`,
    });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say('Saved the picture');
  });
}

// --- Together ----------------------------------------------------------------------------------------------
const script = URL.createObjectURL(new Blob([find('decoder').textContent], { type: 'text/javascript' }));
addEventListener('error', () => (find('trouble').hidden = false));
const views = models.map((model, place) => new View(model, place, new Worker(script)));
document.querySelector('main').classList.toggle('two', views.length > 1);
document.querySelector('.pictures').append(...views.map((view) => view.figure()));
document.querySelector('main').append(...views.map((view) => view.list()));
document.querySelector('.tiles').append(...images.map(makeTile));
document.querySelector('.starts').hidden = !images.length;
mark(start);
hold(views[0], views[0].rows[0]);
for (const [id, act] of Object.entries({ reset, sample, save })) {
  find(id).addEventListener('click', () => {
    stop();
    act();
  });
}
find('play').addEventListener('click', () => (frame === null ? play() : stop()));
